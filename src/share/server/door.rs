//! Who comes in: connections, the hello, and what consumers say later.

use std::io;
use std::time::Duration;

use nix::sys::epoll::{EpollEvent, EpollFlags};

use super::{Departure, LISTENER, MAX_CONSUMERS, Peer, Server, TELL_AGAIN, micros};
use crate::share::consumer::{Consumer, ConsumerInfo, Lost};
use crate::share::peer::is_own;
use crate::share::socket::{Received, Rejected, Socket};
use crate::share::wire::{Malformed, Message, Reason, VERSION};

/// How long a connection may take to say hello.
const HELLO: Duration = Duration::from_secs(2);
/// How long no connection is accepted after that failed, as for want of descriptors.
const PAUSE: Duration = Duration::from_millis(100);

/// The connections that one other user than the server's own may have, and all those together: some places stay the server's user's.
const FOREIGN_USER: usize = 16;
const FOREIGN: usize = 48;
/// How often one is noted at most that said something else than hello.
const STRANGERS: Duration = Duration::from_secs(1);

/// What a consumer is told that wants more than there is.
const READ_ONLY: &str = "it is shared for reading alone; its server says whether consumers can write (--writable)";

/// A connection that has not said hello.
#[derive(Debug)]
pub(super) struct Waiting {
    token: u64,
    socket: Socket,
    peer: Peer,
    pub until_us: u64,
}

fn full() -> String {
    format!("it has {MAX_CONSUMERS} consumers already, or as many connections that are none yet")
}

/// Why a user can have no other connection, besides those of `others`, if it is foreign.
fn has_too_many(uid: u32, others: impl Iterator<Item = u32>) -> Option<String> {
    let (mut of_user, mut of_all) = (0, 0);
    for other in others.filter(|&other| !is_own(other)) {
        of_all += 1;
        of_user += usize::from(other == uid);
    }
    if is_own(uid) {
        return None;
    }
    let user = (of_user >= FOREIGN_USER).then(|| format!("user {uid} has {FOREIGN_USER} connections to it already"));
    user.or_else(|| {
        (of_all >= FOREIGN).then(|| format!("others than its own user have {FOREIGN} connections to it already"))
    })
}

fn refuse(socket: &Socket, text: String) {
    end(socket, Reason::Refused, text);
}

fn end(socket: &Socket, reason: Reason, text: String) {
    // One that does not listen is not told.
    let _ = socket.send(&Message::End { reason, text }, &[]);
}

impl Server {
    /// Why there is no place for another consumer.
    fn has_no_place(&self, uid: u32) -> Option<String> {
        let is_full = self.consumers.len() >= MAX_CONSUMERS || self.waiting.len() >= MAX_CONSUMERS;
        let consumers = self.consumers.iter().map(Consumer::uid);
        let others = consumers.chain(self.waiting.iter().map(|waiting| waiting.peer.uid));
        is_full.then(full).or_else(|| has_too_many(uid, others))
    }

    pub(super) fn accept(&mut self, now: u64) {
        // The rest comes with the next event.
        for _ in 0..16 {
            let (socket, peer) = match self.listener.accept() {
                Ok(Some(connection)) => connection,
                Ok(None) => return,
                Err(_) => {
                    // They wait in the kernel; to ask again at once would be to ask for ever.
                    self.listen(false);
                    self.paused_until_us = Some(now + micros(PAUSE));
                    return;
                }
            };
            if self.ended {
                let _ = socket.send(&Message::End { reason: Reason::Ended, text: String::new() }, &[]);
                continue;
            }
            if !self.access.allows(&peer) {
                let who = "its server says who may (--allow-uid, --allow-gid, --group, --mode)";
                refuse(&socket, format!("user {} may not use it; {who}", peer.uid));
                continue;
            }
            if let Some(text) = self.has_no_place(peer.uid) {
                end(&socket, Reason::Full, text);
                continue;
            }
            self.connections += 1;
            let token = self.connections * 2;
            let input = EpollEvent::new(EpollFlags::EPOLLIN | EpollFlags::EPOLLRDHUP, token);
            match self.epoll.add(&socket, input) {
                Ok(()) => self
                    .waiting
                    .push(Waiting { token, socket, peer, until_us: now + micros(HELLO) }),
                Err(errno) => end(&socket, Reason::Full, format!("it cannot wait for another connection: {errno}")),
            }
        }
    }

    /// Whether new connections are an event.
    pub(super) fn listen(&self, wanted: bool) {
        let events = if wanted { EpollFlags::EPOLLIN } else { EpollFlags::empty() };
        // It is in the list, and the list needs no memory for this.
        let _ = self.epoll.modify(&self.listener, &mut EpollEvent::new(events, LISTENER));
    }

    /// Something came by a socket.
    pub(super) fn hear(&mut self, token: u64) {
        if let Some(index) = self.waiting.iter().position(|waiting| waiting.token == token) {
            match self.waiting[index].socket.receive(false) {
                Ok(Received::Nothing) => {}
                Ok(Received::Message(Message::Hello { name, writable }, _)) => {
                    let Waiting { socket, peer, .. } = self.waiting.swap_remove(index);
                    match writable && !self.request.writable {
                        true => refuse(&socket, READ_ONLY.to_owned()),
                        false => self.serve(token, socket, peer, (name, writable)),
                    }
                }
                Ok(Received::Closed) => drop(self.waiting.swap_remove(index)),
                Ok(Received::Message(..)) => self.turn_away(index, "its first message is no hello"),
                Err(Rejected::Malformed(Malformed::Version(version))) => {
                    let why = format!("version {VERSION} of the protocol is spoken here, and not {version}");
                    refuse(&self.waiting[index].socket, why);
                    self.turn_away(index, &format!("it speaks version {version} of the protocol"));
                }
                Err(rejected) => self.turn_away(index, &rejected.to_string()),
            }
            return;
        }
        let Some(consumer) = self.consumers.iter_mut().find(|consumer| consumer.token == token) else { return };
        if let Err(lost) = consumer.hear() {
            self.lose(token, lost);
        }
    }

    /// Hangs up on one that has said something else than hello. Not each is noted: they may come as fast as they like, and the list of those
    /// that were consumers is short.
    fn turn_away(&mut self, index: usize, why: &str) {
        let Waiting { peer, until_us, .. } = self.waiting.swap_remove(index);
        // The time when it came.
        let now = until_us.saturating_sub(micros(HELLO));
        if self
            .stranger_us
            .is_some_and(|last| now.saturating_sub(last) < micros(STRANGERS))
        {
            return;
        }
        self.stranger_us = Some(now);
        let Peer { pid, uid, gid, .. } = peer;
        let consumer = ConsumerInfo { pid, uid, gid, ..ConsumerInfo::default() };
        self.note(Departure { consumer, why: why.to_owned(), at_fault: true, left: false });
    }

    /// Tells those the rest that could not be told all at once, and when to try again. Those that leave unread what they were sent are in
    /// the way then: descriptors that are on their way count against the server's user, whoever they are for.
    pub(super) fn tell_again(&mut self, now: u64) -> Option<u64> {
        if !self.untold {
            return None;
        }
        let welcome = self.welcome();
        let mut lost = Vec::new();
        for consumer in &mut self.consumers {
            if let Err(error) = consumer.tell(&welcome) {
                lost.push((consumer.token, Lost::untold(&error)));
            } else if consumer.leaves_unread(now) {
                lost.push((consumer.token, Lost::untold(&io::Error::other("it does not read what it is told"))));
            }
        }
        self.lose_all(lost);
        self.untold = self.consumers.iter().any(Consumer::is_untold);
        if self.untold {
            return Some(now + micros(TELL_AGAIN));
        }
        self.consumers.iter_mut().for_each(Consumer::may_read_later);
        None
    }

    fn serve(&mut self, token: u64, socket: Socket, peer: Peer, hello: (String, bool)) {
        if self.consumers.len() >= MAX_CONSUMERS {
            end(&socket, Reason::Full, full());
            return;
        }
        let Peer { pid, uid, gid, .. } = peer;
        let who = ConsumerInfo { pid, uid, gid, name: hello.0.clone(), ..ConsumerInfo::default() };
        let made = Consumer::new(token, socket, peer, hello, self.request.budget).and_then(|consumer| {
            self.epoll
                .add(&consumer.bell, EpollEvent::new(EpollFlags::EPOLLIN, token + 1))?;
            Ok(consumer)
        });
        let mut consumer = match made {
            Ok(consumer) => consumer,
            Err(error) => {
                let why = format!("it could not be served: {error}");
                return self.note(Departure { consumer: who, why, at_fault: false, left: false });
            }
        };
        let greeted = match &self.generation {
            Some(generation) => consumer.greet(&self.welcome(), generation),
            None => Ok(()),
        };
        self.untold |= consumer.is_untold();
        self.consumers.push(consumer);
        if let Err(error) = greeted {
            self.lose(token, Lost::untold(&error));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn other_users_leave_places_to_each_other_and_to_the_servers_own() {
        let own = nix::unistd::geteuid().as_raw();
        let with = |uids: &[(u32, usize)], uid| {
            let others = uids.iter().flat_map(|&(uid, count)| std::iter::repeat_n(uid, count));
            has_too_many(uid, others)
        };
        let [one, two, three, four] = [1, 2, 3, 4].map(|more| own + more);
        assert_eq!(with(&[(own, 60), (one, FOREIGN_USER - 1)], one), None);
        assert!(with(&[(one, FOREIGN_USER)], one).unwrap().contains(&one.to_string()));
        assert_eq!(with(&[(one, FOREIGN_USER)], two), None);
        let crowd = [(one, FOREIGN_USER), (two, FOREIGN_USER), (three, FOREIGN - 2 * FOREIGN_USER)];
        assert!(with(&crowd, four).is_some());
        assert_eq!(with(&crowd, own), None);
    }
}
