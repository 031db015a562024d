//! One consumer, as its server knows it.

use std::io;
use std::os::fd::{AsFd, OwnedFd};

use super::area::SharedArea;
use super::bell::{Bell, BellWatch};
use super::entry::Entry;
use super::give::Gift;
use super::latency::{Latencies, LatencyInfo};
use super::ring::{self, Broken};
use super::socket::{Peer, Socket};
use super::wire::{Message, Shape, Welcome};
use crate::frame::Frame;

/// A consumer of a shared source, as its [`Server`](super::Server) sees it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ConsumerInfo {
    /// Its process, as numbered where the server runs; 0 for one that is not seen there (another pid namespace).
    pub pid: u32,
    /// Its user.
    pub uid: u32,
    /// Its group.
    pub gid: u32,
    /// What it calls itself.
    pub name: String,
    /// Frames that were published to it, also those that were [skipped](ConsumerInfo::skipped) for newer ones before it took them.
    pub frames: u64,
    /// Frames that it did not get, or that were taken back before it took them.
    pub skipped: u64,
    /// Frames that it has now, taken or not.
    pub leases: u32,
    /// How late it takes frames, in µs from when they were published; `None` while it has told of none. What it tells counts from the next
    /// frame on.
    pub latency: Option<LatencyInfo>,
    /// Frames that were taken back after it had taken them, because the camera ran short and their lease had run out.
    pub stolen: u64,
}

/// A consumer that is no more, and why.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Departure {
    /// As it was at last.
    pub consumer: ConsumerInfo,
    /// Why.
    pub why: String,
    /// Whether the server disconnected it for what it did.
    pub at_fault: bool,
}

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
    peer: Peer,
    name: String,
    frames: u64,
    skipped: u64,
    stolen: u64,
    latencies: Latencies,
}

impl Consumer {
    /// # Errors
    /// No memory or no descriptor is left.
    pub(super) fn new(token: u64, socket: Socket, peer: Peer, name: String, budget: u32) -> io::Result<Consumer> {
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
            peer,
            name,
            frames: 0,
            skipped: 0,
            stolen: 0,
            latencies: Latencies::new(),
        })
    }

    pub(super) fn socket(&self) -> &Socket {
        &self.socket
    }

    /// Tells it of a generation, after the welcome if it has not had that.
    ///
    /// # Errors
    /// What sending says: it has hung up, or does not read.
    pub(super) fn greet(&mut self, welcome: &Welcome, generation: &Generation) -> io::Result<()> {
        if let Some((ring, watch)) = &self.unsent {
            let fds = [ring.as_fd(), watch.as_fd(), self.server_bell.as_fd()];
            self.socket.send(&Message::Welcome(welcome.clone()), &fds)?;
            self.unsent = None;
        }
        self.socket.send(&Message::Format(generation.shape.clone()), &[])?;
        for (index, gift) in (0u32..).zip(&generation.gifts) {
            let fds: Vec<_> = gift.fds().collect();
            let message = Message::Buffer { generation: generation.shape.generation, index, identity: gift.identity };
            self.socket.send(&message, &fds)?;
        }
        Ok(())
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
        let held = Held { _frame: frame.clone(), generation: entry.generation, number, since_us: entry.published_us };
        let skipped = self.skipped;
        let words = |more: u32| Entry { skipped: skipped + u64::from(more), ..*entry }.encode();
        let published = self.ring.publish(words, held)?;
        self.skipped += u64::from(published.skipped);
        self.frames += u64::from(published.given);
        self.latencies.add(self.ring.delays());
        if published.wake {
            // Its own bell, which nobody else has: it cannot fail.
            let _ = self.bell.ring();
        }
        Ok(())
    }

    /// Takes the frames back whose lease is `like` that: those that it has not taken, or those as well that it has.
    ///
    /// # Errors
    /// [`Broken`].
    pub(super) fn take_back(
        &mut self,
        like: impl Fn(&Held) -> bool,
        taken_too: bool,
    ) -> std::result::Result<(), Broken> {
        let taken_back = if taken_too { self.ring.take_back(like)? } else { self.ring.skip(like)? };
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
            latency: self.latencies.info(),
            stolen: self.stolen,
        }
    }
}
