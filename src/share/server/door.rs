//! Who comes in: connections, the hello, and what consumers say later.

use std::time::Duration;

use nix::sys::epoll::{EpollEvent, EpollFlags};

use super::{LISTENER, MAX_CONSUMERS, Server, micros};
use crate::share::consumer::{Consumer, Lost};
use crate::share::socket::{Peer, Received, Socket};
use crate::share::wire::{Message, Reason};

/// How long a connection may take to say hello.
const HELLO: Duration = Duration::from_secs(2);
/// How long no connection is accepted after that failed, as for want of descriptors.
const PAUSE: Duration = Duration::from_millis(100);

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

fn refuse(socket: &Socket, text: String) {
    // One that does not listen is not told.
    let _ = socket.send(&Message::End { reason: Reason::Refused, text }, &[]);
}

impl Server {
    fn allows(&self, peer: &Peer) -> bool {
        let Peer { uid, gid, .. } = peer;
        let own = nix::unistd::geteuid().as_raw();
        *uid == own || self.request.allow_uids.contains(uid) || self.request.allow_gids.contains(gid)
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
            let refusal = if !self.allows(&peer) {
                Some(format!("user {} may not use it; its server says who may (--allow-uid)", peer.uid))
            } else if self.consumers.len() >= MAX_CONSUMERS || self.waiting.len() >= MAX_CONSUMERS {
                Some(full())
            } else {
                None
            };
            if let Some(text) = refusal {
                refuse(&socket, text);
                continue;
            }
            self.connections += 1;
            let token = self.connections * 2;
            let input = EpollEvent::new(EpollFlags::EPOLLIN | EpollFlags::EPOLLRDHUP, token);
            if self.epoll.add(&socket, input).is_ok() {
                self.waiting
                    .push(Waiting { token, socket, peer, until_us: now + micros(HELLO) });
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
            match self.waiting[index].socket.receive() {
                Ok(Received::Nothing) => {}
                Ok(Received::Message(Message::Hello { name, writable }, _)) => {
                    let Waiting { socket, peer, .. } = self.waiting.swap_remove(index);
                    match writable && !self.request.writable {
                        true => refuse(&socket, READ_ONLY.to_owned()),
                        false => self.serve(token, socket, peer, name),
                    }
                }
                Ok(_) | Err(_) => drop(self.waiting.swap_remove(index)),
            }
            return;
        }
        let Some(consumer) = self.consumers.iter_mut().find(|consumer| consumer.token == token) else { return };
        if let Err(lost) = consumer.hear() {
            self.lose(token, lost);
        }
    }

    fn serve(&mut self, token: u64, socket: Socket, peer: Peer, name: String) {
        if self.consumers.len() >= MAX_CONSUMERS {
            refuse(&socket, full());
            return;
        }
        let made = Consumer::new(token, socket, peer, name, self.request.budget);
        // For want of memory or descriptors: it hears that it was hung up on.
        let Ok(mut consumer) = made else { return };
        let input = EpollEvent::new(EpollFlags::EPOLLIN | EpollFlags::EPOLLET, token + 1);
        if self.epoll.add(&consumer.server_bell, input).is_err() {
            return;
        }
        let greeted = match &self.generation {
            Some(generation) => consumer.greet(&self.welcome(), generation),
            None => Ok(()),
        };
        self.consumers.push(consumer);
        if let Err(error) = greeted {
            self.lose(token, Lost::left(&format!("it could not be told of the buffers: {error}")));
        }
    }
}
