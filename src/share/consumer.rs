//! One consumer, as its server knows it.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use nix::libc;

use super::area::SharedArea;
use super::bell::Bell;
use super::entry::Entry;
use super::fences::{Returning, sync_file};
use super::give::Gift;
use super::latency::{Latencies, LatencyInfo};
use super::peer::{Peer, is_own};
use super::ring::{self, Broken};
use super::socket::{Received, Socket, let_descriptors_come};
use super::wire::{Message, Shape, Welcome};
use crate::fence::SyncFile;
use crate::frame::{Frame, SlotsArc};

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
    kept: Kept,
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
enum Kept {
    Frame(Frame),
    /// The consumer has dropped the frame, and its device reads it until this has signalled.
    Fence(ReleaseFence),
}

/// A release fence that the source waits for before it fills the buffer again; it does so no longer when this is dropped.
struct ReleaseFence {
    slots: SlotsArc,
    slot: u32,
    fence: Arc<SyncFile>,
}

impl ReleaseFence {
    /// As a sink of this process leaves it, which then drops the frame.
    fn leave(frame: &Frame, fence: SyncFile) -> ReleaseFence {
        let fence = Arc::new(fence);
        frame.release_after(Arc::clone(&fence));
        ReleaseFence { slots: SlotsArc::clone(frame.lease().slots_arc()), slot: frame.slot(), fence }
    }
}

impl Drop for ReleaseFence {
    fn drop(&mut self) {
        self.slots.no_longer_after(self.slot, &self.fence);
    }
}

impl std::fmt::Debug for ReleaseFence {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "ReleaseFence(slot {})", self.slot)
    }
}

/// Why a consumer is no longer served.
#[derive(Debug)]
pub(super) struct Lost {
    pub why: String,
    /// Whether it has broken the protocol.
    pub at_fault: bool,
    /// Whether it went by itself.
    pub left: bool,
}

impl Lost {
    fn left(why: &str) -> Lost {
        Lost { why: why.to_owned(), at_fault: false, left: true }
    }

    pub(super) fn broken(why: impl ToString) -> Lost {
        Lost { why: why.to_string(), at_fault: true, left: false }
    }

    /// It could not be told of buffers: most have just hung up.
    pub(super) fn untold(error: &io::Error) -> Lost {
        match error.kind() {
            io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset => Lost::left("it hung up"),
            _ => Lost { why: format!("it could not be told of the buffers: {error}"), at_fault: false, left: false },
        }
    }
}

impl From<Broken> for Lost {
    fn from(broken: Broken) -> Lost {
        Lost::broken(broken)
    }
}

/// So much kernel memory may messages take that a consumer has not read, in bytes, before it is sent another fence: some 16 of them. The
/// budget is less than that, so who reads what belongs to the frames that it takes never has so many; and the descriptors on their way to
/// those who do not read are not too many for others (`too_many_unix_fds` in net/unix/scm.c).
const UNREAD: u64 = 16 << 10;

#[derive(Debug)]
pub(super) struct Consumer {
    /// Names its descriptors in the server's list.
    pub token: u64,
    socket: Socket,
    pub ring: ring::Server<SharedArea, Held>,
    /// Rung for it, and by it.
    pub bell: Bell,
    /// How often it has rung at least, see [`Consumer::heard`].
    rung: u64,
    /// What goes with the welcome, ring and bell; none when that was sent.
    unsent: Option<[OwnedFd; 2]>,
    /// Of frames that it is about to give back.
    returning: Returning,
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
    latencies: Latencies,
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
        if is_own(peer.uid) {
            let_descriptors_come(&socket, true)?;
        }
        let (area, fd) = SharedArea::create()?;
        let (bell, theirs) = Bell::pair()?;
        let ring = ring::Server::new(area, budget as usize);
        Ok(Consumer {
            token,
            socket,
            ring,
            bell,
            rung: 0,
            unsent: Some([fd, theirs]),
            returning: Returning::default(),
            untold: VecDeque::new(),
            unread_us: None,
            writable,
            peer,
            name,
            frames: 0,
            skipped: 0,
            stolen: 0,
            latencies: Latencies::new(),
        })
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
        if let Some(fds) = self.unsent.as_ref().filter(|_| !self.untold.is_empty()) {
            let fds = fds.each_ref().map(AsFd::as_fd);
            let welcome = Welcome { fences: is_own(self.peer.uid), ..welcome.clone() };
            self.socket.send(&Message::Welcome(welcome), &fds)?;
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

    /// Gives it a frame, with the fence before which that does not hold the picture, if it has one, and tells whether it got it. Some ten
    /// loads and stores; a system call only if it sleeps, and two for the fence.
    ///
    /// # Errors
    /// It has written nonsense.
    pub(super) fn publish(
        &mut self,
        entry: &Entry,
        number: u64,
        frame: &Frame,
        fence: Option<&SyncFile>,
    ) -> std::result::Result<bool, Lost> {
        if self.unsent.is_some() {
            return Ok(false);
        }
        if !self.untold.is_empty() {
            self.skipped += 1;
            return Ok(false);
        }
        if self.ring.has_fenced() {
            self.settle()?;
        }
        let kept = Kept::Frame(frame.clone());
        let held = Held { kept, generation: entry.generation, number, since_us: entry.published_us };
        let skipped = self.skipped;
        let words = |more: u32| Entry { skipped: skipped + u64::from(more), ..*entry }.encode();
        let published = match fence {
            None => self.ring.publish(words, held)?,
            Some(fence) => {
                let mut room = self.ring.make_room()?;
                if room.given && self.send_fence(fence) {
                    room.wake = self.ring.put(words(room.skipped), held);
                } else if room.given {
                    // Nor anything older: what it takes when it has read its messages is the newest then.
                    room.given = false;
                    room.skipped += 1 + self.ring.skip_untaken()?;
                }
                room
            }
        };
        self.skipped += u64::from(published.skipped);
        self.frames += u64::from(published.given);
        self.latencies.add(self.ring.delays());
        if published.wake {
            // The server's own end of it: it cannot fail.
            let _ = self.bell.ring();
        }
        // Those that were found just now.
        if self.ring.has_fenced() {
            self.settle()?;
        }
        Ok(published.given)
    }

    /// Sends the acquire fence of the next frame. `false` if it does not read its messages, or has hung up, or if too many descriptors
    /// are on their way from this user: then it is as one that is late.
    fn send_fence(&self, fence: &SyncFile) -> bool {
        let message = Message::Fence { position: self.ring.position() };
        self.socket.unread().is_ok_and(|unread| unread < UNREAD) && self.socket.send(&message, &[fence.as_fd()]).is_ok()
    }

    /// It has rung. It may for each frame that it gives back, and for nothing else: so one that would keep the server awake is not served.
    ///
    /// # Errors
    /// It has rung more often, has closed its end, or has written nonsense.
    pub(super) fn heard(&mut self) -> std::result::Result<(), Lost> {
        let heard = self.bell.heard().ok_or_else(|| Lost::left("it hung up"))?;
        let (rung, frames) = (self.rung + heard as u64, self.ring.position());
        if rung > frames {
            return Err(Lost::broken("it rings without having given a frame back"));
        }
        // What it did not ring for long ago it cannot ring for now: those that it has are fewer.
        self.rung = rung.max(frames.saturating_sub(2 * ring::ENTRIES as u64));
        self.collect()
    }

    /// Gives up what it has released, and hands its release fences on.
    ///
    /// # Errors
    /// It has written nonsense.
    pub(super) fn collect(&mut self) -> std::result::Result<(), Lost> {
        self.ring.collect()?;
        if self.ring.has_fenced() { self.settle() } else { Ok(()) }
    }

    /// Of the frames that it has given back behind a fence: leaves the fences of those that are new with their buffers, and gives up those
    /// whose fences have signalled. One system call for each.
    fn settle(&mut self) -> std::result::Result<(), Lost> {
        let unknown = self.ring.fenced_without(|held| matches!(held.kept, Kept::Fence(_)));
        for position in unknown {
            let fence = loop {
                if let Some(fence) = self.returning.take(position) {
                    break fence;
                }
                // It was sent before.
                if !self.hear()? {
                    return Err(Lost::broken(format!("the fence of frame {position} has not come")));
                }
            };
            if let Some(held) = self.ring.lease_mut(position)
                && let Kept::Frame(frame) = &held.kept
            {
                held.kept = Kept::Fence(ReleaseFence::leave(frame, fence));
            }
        }
        self.ring.keep_fenced(|held| match &held.kept {
            Kept::Fence(release) => !release.fence.is_signalled(),
            // It was given back just now.
            Kept::Frame(_) => true,
        });
        Ok(())
    }

    /// Whether it may send release fences: whoever sends descriptors can make the server wait when it closes them, and so the server's own
    /// user alone, which can stop the server as well.
    fn may_send_fences(&self) -> bool {
        is_own(self.peer.uid)
    }

    /// Takes a message, if there is one.
    ///
    /// # Errors
    /// It has hung up, ended, or breaks the protocol.
    pub(super) fn hear(&mut self) -> std::result::Result<bool, Lost> {
        match self.socket.receive(self.may_send_fences()) {
            Ok(Received::Nothing) => return Ok(false),
            Ok(Received::Closed) => return Err(Lost::left("it hung up")),
            Ok(Received::Message(Message::End { .. }, _)) => return Err(Lost::left("it has ended")),
            Ok(Received::Message(Message::Fence { position }, fds)) => {
                let fence = sync_file(fds).map_err(Lost::broken)?;
                let (ring, bounds) = (&self.ring, (self.ring.position(), self.stolen));
                let added = self.returning.add(position, fence, |position| ring.is_out(position), bounds);
                added.map_err(Lost::broken)?;
            }
            Ok(Received::Message(..)) => return Err(Lost::broken("it sent a message that is a server's")),
            Err(rejected) => return Err(Lost::broken(rejected)),
        }
        Ok(true)
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
