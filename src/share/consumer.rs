//! One consumer, as its server knows it.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use nix::libc;

use super::area::SharedArea;
use super::bell::{Bell, BellWatch};
use super::entry::Entry;
use super::give::Gift;
use super::peer::Peer;
use super::ring::{self, Broken};
use super::socket::Socket;
use super::wire::{Message, Shape, Welcome};
use crate::frame::Frame;

/// A consumer of a shared source, as its [`Server`](super::Server) sees it.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct ConsumerInfo {
    /// Its process, as numbered where the server runs; 0 for one that is not seen there (another pid namespace).
    pub pid: u32,
    /// Its user.
    pub uid: u32,
    /// Its group.
    pub gid: u32,
    /// What it calls itself.
    pub name: String,
    /// Frames that were given to it.
    pub frames: u64,
    /// Frames that it did not get, or that were taken back before it took them.
    pub skipped: u64,
    /// Frames that it has now, taken or not.
    pub leases: u32,
    /// Frames that were taken back after it had taken them, because the camera ran short and their lease had run out.
    pub stolen: u64,
}

/// A consumer that is no more, and why; or a connection that was never one, because its first packet was no hello.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Departure {
    /// As it was at last.
    pub consumer: ConsumerInfo,
    /// Why.
    pub why: String,
    /// Whether the server disconnected it for what it did.
    pub at_fault: bool,
    /// Whether it went by itself: it hung up, or said so before.
    pub left: bool,
}

/// Generations that a consumer may have to be told of while it does not read: a ring has fewer frames.
const UNTOLD: usize = 16;
/// How long it may leave what it was sent unread while others, or it itself, wait for it to be read.
const UNREAD_US: u64 = 3_000_000;

/// Buffers of one shape.
#[derive(Debug)]
pub(super) struct Generation {
    pub shape: Shape,
    pub gifts: Vec<Gift>,
}

/// What is kept while a frame is with a consumer.
#[derive(Debug)]
pub(super) struct Held {
    /// Kept so that the buffer is not filled again.
    _frame: Frame,
    pub generation: u32,
    /// Its number among all that were presented.
    pub number: u64,
    pub since_us: u64,
}

/// A generation that a consumer is being told of.
#[derive(Debug)]
struct Telling {
    generation: Arc<Generation>,
    /// Whether it knows the format.
    format: bool,
    /// How many of the buffers it has.
    buffers: usize,
}

#[derive(Debug)]
pub(super) struct Consumer {
    /// Names its descriptors in the server's list.
    pub token: u64,
    socket: Socket,
    pub ring: ring::Server<SharedArea, Held>,
    /// Rung for it.
    bell: Bell,
    /// Rung by it.
    pub server_bell: Bell,
    /// What goes with the welcome; none when that was sent.
    unsent: Option<(OwnedFd, BellWatch)>,
    /// What it is not told yet, the oldest first; so no frame goes to it.
    untold: VecDeque<Telling>,
    /// Since when it is known not to have read all, in µs.
    unread_us: Option<u64>,
    /// Whether it wants to write into buffers.
    writable: bool,
    peer: Peer,
    name: String,
    frames: u64,
    skipped: u64,
    stolen: u64,
}

impl Consumer {
    /// # Errors
    /// No memory or no descriptor is left.
    pub(super) fn new(
        token: u64,
        socket: Socket,
        peer: Peer,
        (name, writable): (String, bool),
        budget: u32,
    ) -> io::Result<Consumer> {
        let (area, fd) = SharedArea::create()?;
        let bell = Bell::new()?;
        let watch = bell.watch()?;
        let ring = ring::Server::new(area, budget as usize);
        Ok(Consumer {
            token,
            socket,
            ring,
            bell,
            server_bell: Bell::new()?,
            unsent: Some((fd, watch)),
            untold: VecDeque::new(),
            unread_us: None,
            writable,
            peer,
            name,
            frames: 0,
            skipped: 0,
            stolen: 0,
        })
    }

    pub(super) fn socket(&self) -> &Socket {
        &self.socket
    }

    pub(super) fn uid(&self) -> u32 {
        self.peer.uid
    }

    /// Tells it of a generation, after the welcome if it has not had that; the rest [later](Consumer::tell) if not all can be sent now.
    ///
    /// # Errors
    /// What sending says: it has hung up, or does not read.
    pub(super) fn greet(&mut self, welcome: &Welcome, generation: &Arc<Generation>) -> io::Result<()> {
        if self.untold.len() >= UNTOLD {
            return Err(io::Error::other("it does not read what it is told"));
        }
        self.untold
            .push_back(Telling { generation: Arc::clone(generation), format: false, buffers: 0 });
        self.tell(welcome).map(drop)
    }

    /// Tells it what it was not told yet, as far as that can be sent now, and whether that was all. It cannot while its queue is full
    /// (`EAGAIN`), nor while more descriptors are on their way than this user may have (`ETOOMANYREFS`, unix(7)), whoever does not read
    /// them.
    ///
    /// # Errors
    /// What sending says: it has hung up.
    pub(super) fn tell(&mut self, welcome: &Welcome) -> io::Result<bool> {
        match self.send_untold(welcome) {
            Err(error) if matches!(error.raw_os_error(), Some(libc::EAGAIN | libc::ETOOMANYREFS)) => Ok(false),
            other => other.map(|()| true),
        }
    }

    fn send_untold(&mut self, welcome: &Welcome) -> io::Result<()> {
        if let Some((ring, watch)) = self.unsent.as_ref().filter(|_| !self.untold.is_empty()) {
            let fds = [ring.as_fd(), watch.as_fd(), self.server_bell.as_fd()];
            self.socket.send(&Message::Welcome(welcome.clone()), &fds)?;
            self.unsent = None;
        }
        while let Some(telling) = self.untold.front_mut() {
            let generation = Arc::clone(&telling.generation);
            if !telling.format {
                self.socket.send(&Message::Format(generation.shape.clone()), &[])?;
                telling.format = true;
            }
            // No more than 64.
            for (index, gift) in (0u32..).zip(&generation.gifts).skip(telling.buffers) {
                let fds: Vec<_> = gift.fds(self.writable).collect();
                let identity = gift.identity(self.writable);
                let message = Message::Buffer { generation: generation.shape.generation, index, identity };
                self.socket.send(&message, &fds)?;
                telling.buffers += 1;
            }
            self.untold.pop_front();
        }
        Ok(())
    }

    /// Whether something is still to be told to it.
    pub(super) fn is_untold(&self) -> bool {
        !self.untold.is_empty()
    }

    /// Whether it leaves unread what it was sent, and has for too long. To be asked while somebody waits for it to be read.
    pub(super) fn leaves_unread(&mut self, now: u64) -> bool {
        self.unread_us = self.socket.is_unread().then(|| self.unread_us.unwrap_or(now));
        self.unread_us.is_some_and(|since| now.saturating_sub(since) >= UNREAD_US)
    }

    /// Nobody waits any more for it to read.
    pub(super) fn may_read_later(&mut self) {
        self.unread_us = None;
    }

    /// Says why it is no longer served, if it can be told.
    pub(super) fn part(&mut self, message: &Message) {
        // One that has hung up, or does not read, is not told.
        let _ = self.socket.send(message, &[]);
    }

    /// Gives it a frame. Some ten loads and stores; a system call only if it sleeps.
    ///
    /// # Errors
    /// [`Broken`].
    pub(super) fn publish(&mut self, entry: &Entry, number: u64, frame: &Frame) -> std::result::Result<(), Broken> {
        if self.unsent.is_some() {
            return Ok(());
        }
        if !self.untold.is_empty() {
            self.skipped += 1;
            return Ok(());
        }
        let held = Held { _frame: frame.clone(), generation: entry.generation, number, since_us: entry.published_us };
        let skipped = self.skipped;
        let words = |more: u32| Entry { skipped: skipped + u64::from(more), ..*entry }.encode();
        let published = self.ring.publish(words, held)?;
        self.skipped += u64::from(published.skipped);
        self.frames += u64::from(published.given);
        if published.wake {
            // Its own bell, which nobody else has: it cannot fail.
            let _ = self.bell.ring();
        }
        Ok(())
    }

    /// Takes the frames back whose lease is `like` that, taken or not.
    ///
    /// # Errors
    /// [`Broken`].
    pub(super) fn take_back(&mut self, like: impl Fn(&Held) -> bool) -> std::result::Result<(), Broken> {
        let taken_back = self.ring.take_back(like)?;
        self.skipped += u64::from(taken_back.skipped);
        self.stolen += u64::from(taken_back.revoked);
        Ok(())
    }

    pub(super) fn info(&self) -> ConsumerInfo {
        ConsumerInfo {
            pid: self.peer.pid,
            uid: self.peer.uid,
            gid: self.peer.gid,
            name: self.name.clone(),
            frames: self.frames,
            skipped: self.skipped,
            // A ring has few.
            leases: self.ring.leases().count() as u32,
            stolen: self.stolen,
        }
    }
}
