//! `Receiver`: a source of frames that another process shares.

mod again;
mod connect;
mod hear;
mod lost;
mod wait;

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::time::Duration;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::eventfd::{EfdFlags, EventFd};

use super::area::SharedArea;
use super::entry::Entry;
use super::held::{HELD, Held, HeldFrames};
use super::incoming::Generation;
use super::join::{Hello, Joined, Joining};
use super::ring::{Consumer, Taken};
use super::socket::Place;
use super::wire::{Reason, Timing};
use crate::clock::now_us;
use crate::endpoint::{Ready, Source, SourceCounts};
use crate::error::{Context, Error, Kind, Result};
use crate::fence::SyncFile;
use crate::format::Layout;
use crate::frame::{Buffer, Frame, Revoked, Room, ViewPolicy};
use crate::ledger::{Copies, Ledger};
use crate::timer::Timer;
use again::{Back, End};
use lost::Lost;
use wait::{TRIES, listen};

/// Names in the list of descriptors.
const SOCKET: u64 = 0;
const BELL: u64 = 1;
const AGAIN: u64 = 2;
const BACK: u64 = 3;
const ALARM: u64 = 4;

/// How long a server may take to say why no frame comes, once it knows.
const SAYS_WHY: Duration = Duration::from_secs(1);

fn edge(name: u64) -> EpollEvent {
    EpollEvent::new(EpollFlags::EPOLLIN | EpollFlags::EPOLLET, name)
}

/// A [`Source`] whose frames another process shares ([`Server`](super::Server)): the source's own buffers, no copy.
///
/// A frame costs some ten loads and stores; system calls are only for sleeping. Its [lease](Frame::lease) is the server's: a frame that is
/// kept for longer than [`lease`](Receiver::lease) may be taken back when the server's source runs short of buffers, and its memory be
/// filled with another picture then. [`holds`](Receiver::holds) tells whether that has happened: what was read before it said `true` was the
/// frame. Views of frames are detached in time (at three quarters of the lease, when the receiver is called; one copy, in
/// [`copies`](Source::copies)), unless the [policy](ViewPolicy) is to wait; one that was not, and whose frame was taken back, reports
/// [`Revoked`](crate::frame::Revoked) at its next access. The descriptor becomes readable when that is due: of views that were there at the
/// last call, so a program that makes one between a call that gave no frame and its next wait calls [`recycle`](Source::recycle) first.
///
/// A frame that a device still writes comes with its [acquire fence](Frame::acquire_fence), as a camera's does; its lease counts from when it
/// was published all the same. One that is dropped while a device here still reads it is given back with its
/// [release fence](Frame::release_after), and counts against the budget until that has signalled. If that takes longer than the lease, the
/// buffer may be filled while it is read, and nobody here is told. Where the fence cannot be sent, since the server has not read those
/// before, the frame is given back when it has signalled. With a fence a frame costs some system calls each way.
///
/// Frames come in order; a receiver that is late gets the newest, and [counts](Source::counts) the others as skipped. When the source
/// changes its format, [`FormatChanged`](Kind::FormatChanged) comes and [`follow`](Source::follow) goes on; frames of before stay valid.
/// That comes with the first frame of the new format, for which there must be room: what is still held of before counts against the budget.
/// There is one format for all who share the source, so other strides or buffers are refused.
///
/// When the server is gone its frames stay valid, and [`try_next`](Source::try_next) reports the end; or, once it was
/// [told to](Receiver::come_back_to_it), the receiver waits for the next server there.
///
/// The server is not trusted to be in order: memory that could be cut off is refused, and what it says is checked.
#[derive(Debug)]
pub struct Receiver {
    name: String,
    hello: Hello,
    epoll: Epoll,
    server: Joined,
    ring: Consumer<SharedArea>,
    /// Rung by this side itself where frames are there and nobody rang for them: while it does not sleep, an event is pending, so that who
    /// waits for the descriptor calls again.
    again: EventFd,
    /// Set to when the next view is to be detached; none until a frame has a view.
    alarm: Option<Timer>,
    frames: HeldFrames,
    /// Of generations before, and of servers before.
    old: Vec<HeldFrames>,
    /// Copies for views of those that are no more, since the newest generation began.
    old_copies: Ledger,
    /// The first frame of a generation that is not followed yet.
    next: Option<(Taken, Entry)>,
    /// The acquire fence of the frame that was taken last, until that is handed out.
    fence: Option<SyncFile>,
    view_policy: ViewPolicy,
    lost: Lost,
    revoked: u64,
    end: Option<End>,
    /// How to come back when the server has ended.
    back: Option<Back>,
}

impl Receiver {
    /// Of a server that was joined.
    ///
    /// # Errors
    /// What `epoll_create1`, `epoll_ctl` and `eventfd2` say.
    pub(super) fn of(hello: Hello, server: Joined) -> Result<Receiver> {
        let name = hello.place.to_string();
        let about = || name.clone();
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).context("wait for", about)?;
        listen(&epoll, &server).context("wait for", about)?;
        let flags = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK;
        let again = EventFd::from_value_and_flags(1, flags).context("wait for", about)?;
        epoll.add(&again, edge(AGAIN)).context("wait for", about)?;
        Ok(Receiver {
            name,
            hello,
            epoll,
            ring: Consumer::new(server.area.clone()),
            frames: HeldFrames::new(server.area.clone()),
            server,
            again,
            alarm: None,
            old: Vec::new(),
            old_copies: Ledger::new(),
            next: None,
            fence: None,
            view_policy: ViewPolicy::default(),
            lost: Lost::default(),
            revoked: 0,
            end: None,
            back: None,
        })
    }

    /// What the server calls its source.
    pub fn source(&self) -> &str {
        &self.server.welcome.source
    }

    /// How long a frame may be kept at least, counted from when the server published it. It may be another after each
    /// [`follow`](Source::follow).
    pub fn lease(&self) -> Duration {
        Duration::from_micros(self.timing().lease_us)
    }

    fn timing(&self) -> &Timing {
        &self.server.generation.shape.timing
    }

    /// How many frames may be held at a time; more come when one is dropped.
    pub fn budget(&self) -> u32 {
        self.server.welcome.budget
    }

    /// Whether a frame that came from here was not taken back: what was read of it before is the frame. One load.
    pub fn holds(&self, frame: &Frame) -> bool {
        let mut all = std::iter::once(&self.frames).chain(&self.old);
        all.any(|frames| frames.of(frame).is_some()) && frame.check().is_ok()
    }

    /// Frames that were taken back while they were held here, counted when they are dropped.
    pub fn revoked(&self) -> u64 {
        self.revoked
    }

    /// Frames that the server had for this receiver and did not give it, because it was late: those of [`counts`](Source::counts).
    pub fn skipped(&self) -> u64 {
        self.lost.skipped()
    }

    /// Gives up what was dropped, and detaches views whose lease is about to run out.
    fn give_back(&mut self) -> Result<()> {
        self.release()?;
        let viewed = |frames: &HeldFrames| !frames.slots().views().is_empty();
        let views = viewed(&self.frames) || self.old.iter().any(viewed);
        if self.view_policy == ViewPolicy::Wait || (!views && self.alarm.is_none()) {
            return Ok(());
        }
        self.detach_due(views)
    }

    #[cold]
    fn detach_due(&mut self, views: bool) -> Result<()> {
        if !views {
            return self.set_alarm(None);
        }
        let early = self.timing().lease_us / 4;
        let due = |now: u64| now.saturating_add(early);
        let mut detached = false;
        for frames in std::iter::once(&self.frames).chain(&self.old) {
            while frames.detach_view_due(due(now_us())) {
                detached = true;
            }
        }
        if detached {
            self.release()?;
        }
        let all = std::iter::once(&self.frames).chain(&self.old);
        let until = all.filter_map(HeldFrames::first_viewed_until).min();
        let now = now_us();
        let again = || self.alarm.as_ref().and_then(Timer::at_us).filter(|&at| at > now);
        let next = |until: u64| match until.saturating_sub(early) {
            at if at > now => at,
            // One that could not be detached, for its frame is held besides, is tried again.
            _ => again().unwrap_or(now + early.max(1000)),
        };
        self.set_alarm(until.map(next))
    }

    #[inline]
    fn release(&mut self) -> Result<()> {
        let (server, revoked) = (&self.server, &mut self.revoked);
        let mut release = |frames: &mut HeldFrames| {
            let here = frames.is_of(&server.area);
            let released = frames.release((here && server.welcome.fences).then_some(&server.socket));
            // What is left of a server that is gone is nobody's loss.
            if here {
                *revoked += released.revoked;
            }
            here && released.wake
        };
        let mut wake = release(&mut self.frames);
        if !self.old.is_empty() {
            self.old.iter_mut().for_each(|frames| wake |= release(frames));
            let copies = &mut self.old_copies;
            self.old.retain(|frames| {
                if frames.is_empty() {
                    frames.account_for(copies);
                }
                !frames.is_empty()
            });
        }
        if wake { self.server.bell.ring().context("wake", || self.name.as_str()) } else { Ok(()) }
    }

    /// The frame of an entry, if it is of the generation that is followed.
    fn frame(&mut self, taken: Taken, entry: Entry) -> Result<Option<Frame>> {
        let lost = |why: &str| Error::new(Kind::Disconnected, "read frames from", &self.name).because(why.to_owned());
        let buffer = self.server.generation.buffers.get(entry.buffer as usize);
        let buffer = buffer
            .ok_or_else(|| lost("its server names a buffer that it has not sent"))?
            .clone();
        let mut meta = entry.meta;
        buffer.limit(&mut meta.bytes_used);
        let (now, lease) = (now_us(), self.timing().lease_us);
        // The clocks are the same, unless the server is in another time namespace.
        let until_us = entry.published_us.min(now).saturating_add(lease);
        if let Some(late) = now.checked_sub(entry.published_us) {
            self.ring.tell_delay(late);
        }
        self.lost.came(meta.sequence, entry.skipped);
        let held = Held { position: taken.position, until_us };
        let frame = match &self.fence {
            None => self.frames.hold(held, buffer, meta),
            Some(_) => self
                .fence
                .take()
                .and_then(|fence| self.frames.hold_fenced(held, buffer, meta, fence)),
        };
        frame.map(Some).ok_or_else(|| lost("too many of its frames are held"))
    }

    /// The next frame that is there; no system call if there is none.
    fn found(&mut self) -> Result<Option<Frame>> {
        let mut next = None;
        for _ in 0..TRIES {
            let Some((taken, entry)) = self.take()? else { return Ok(None) };
            if entry.generation == self.server.generation.shape.generation {
                return self.frame(taken, entry);
            }
            self.hear();
            if !self.server.coming.has_forgotten(entry.generation) {
                next = Some((taken, entry));
                break;
            }
            self.pass_over(taken)?;
        }
        let Some((taken, entry)) = next else { return Ok(None) };
        let known = |coming: &Generation| coming.shape.generation == entry.generation && coming.is_whole();
        if !self.server.coming.iter().any(known) {
            let error = Error::new(Kind::Disconnected, "read frames from", self.name.clone());
            return Err(error.because("its server breaks the protocol: a frame is in buffers that it has not sent"));
        }
        self.next = Some((taken, entry));
        let error = Error::new(Kind::FormatChanged, "read frames from", self.name.clone());
        Err(error
            .because("the source that is shared has changed")
            .repair("start again to use what comes now"))
    }

    /// What is held is of before. So are the copies that were made until now: whoever follows has [asked](Source::copies) before. Of views
    /// that are detached from now on it hears the next time, whatever frames they are of.
    fn begin_anew(&mut self) {
        let before = std::mem::replace(&mut self.frames, HeldFrames::new(self.server.area.clone()));
        self.old.push(before);
        self.old.iter_mut().for_each(HeldFrames::close_account);
        self.old_copies = Ledger::new();
        self.lost.begin_anew();
    }

    /// The next entry of the ring.
    fn take(&mut self) -> Result<Option<(Taken, Entry)>> {
        if let Some(next) = self.next {
            self.next = None;
            if self.ring.holds(next.0.position) {
                return Ok(Some(next));
            }
            // It was taken back before the program followed.
            self.revoked += 1;
            self.fence = None;
        }
        if !self.frames.has_room() {
            let busy = Error::new(Kind::Busy, "read frames from", self.name.clone());
            return Err(busy
                .because(format!("{} of its frames are held here, taken back or not", HELD))
                .repair("drop frames sooner"));
        }
        let Some(taken) = self.ring.take() else { return Ok(None) };
        match Entry::decode(taken.words) {
            Ok(entry) => {
                if entry.fenced || !self.server.fences.is_empty() {
                    self.find_fence(taken.position, entry.fenced)?;
                }
                Ok(Some((taken, entry)))
            }
            // It was not ours any more when it was read.
            Err(_) if !self.ring.holds(taken.position) => Ok(None),
            Err(why) => {
                let gone = Error::new(Kind::Disconnected, "read frames from", self.name.clone());
                Err(gone.because(format!("its server breaks the protocol: {why}")))
            }
        }
    }
}

impl Source for Receiver {
    fn name(&self) -> &str {
        &self.name
    }

    fn layout(&self) -> &Layout {
        &self.server.generation.shape.layout
    }

    fn rate(&self) -> Option<f64> {
        Some(self.timing().rate_micro as f64 / 1e6).filter(|rate| *rate > 0.0)
    }

    fn buffers(&self) -> &[Buffer] {
        &self.server.generation.buffers
    }

    /// Frames flow from the moment of connecting; those that nobody takes are skipped.
    fn start(&mut self) -> Result<()> {
        Ok(())
    }

    fn release_fences(&self) -> Vec<Arc<SyncFile>> {
        let all = std::iter::once(&self.frames).chain(&self.old);
        all.flat_map(|frames| frames.slots().release_fences())
            .map(|(_, fence)| fence)
            .collect()
    }

    fn try_next(&mut self, _: Ready) -> Result<Option<Frame>> {
        self.give_back()?;
        for _ in 0..TRIES {
            match self.found() {
                Ok(None) => {}
                found => return found,
            }
            // This also says that the bell was heard: it is an event again only when it is rung again.
            self.listen(EpollTimeout::ZERO)?;
            // A frame that was published before the end, or before this said that it sleeps, is there now.
            if self.falls_asleep() {
                return self.ended().map(|()| None);
            }
            self.call_again()?;
        }
        Ok(None)
    }

    fn recycle(&mut self) -> Result<()> {
        self.give_back()
    }

    /// Frames go on to be published and skipped.
    fn stop(&mut self) -> Result<()> {
        self.give_back()
    }

    fn agree(&mut self, wished: &Layout) -> Result<(Layout, Room)> {
        if wished == self.layout() {
            return Ok((*wished, Room::default()));
        }
        let error = Error::new(Kind::Unsupported, "lay out otherwise", self.name.clone());
        Err(error
            .because(format!("it is shared by others and is {} for all", self.layout()))
            .repair("choose the format where it is shared (dmaflow share --format, --size, --stride)"))
    }

    fn use_buffers(&mut self, buffers: Vec<Buffer>) -> Result<()> {
        drop(buffers);
        let error = Error::new(Kind::Unsupported, "use other buffers in", self.name.clone());
        Err(error
            .because("it is shared by others, and its buffers are its server's")
            .repair("let frames be copied here, or share from a source with other buffers"))
    }

    fn follow(&mut self) -> Result<()> {
        self.follow_back()?;
        let Some((_, entry)) = &self.next else { return Ok(()) };
        // Those before it had no frame that came here.
        while let Some(generation) = self.server.coming.pop_front() {
            if generation.shape.generation == entry.generation {
                self.server.generation = generation;
                self.begin_anew();
                return Ok(());
            }
        }
        Ok(())
    }

    fn set_view_policy(&mut self, policy: ViewPolicy) {
        self.view_policy = policy;
    }

    /// Twice what the server waits for a frame of its source, and a second: it may wait for a signal for that time when its source has
    /// changed, and then for a frame, and who waits for the server is to hear from it what has gone wrong. `None` if the server waits for
    /// any time, and with [`come_back_to_it`](Receiver::come_back_to_it): then a server that says nothing is as one that is away.
    fn watchdog(&self) -> Option<Duration> {
        let time = Duration::from_micros(self.timing().watchdog_us);
        let longer = time.saturating_mul(2).saturating_add(SAYS_WHY);
        (!time.is_zero() && self.back.is_none()).then_some(longer)
    }

    fn stalled(&self) -> Error {
        let error = Error::new(Kind::Timeout, "get a frame from", self.name.clone());
        error
            .because(format!("none came; of its frames, {} are held here", self.frames.slots().counts().dequeued))
            .repair("drop frames sooner; if none are held, look at the server and its source")
    }

    fn counts(&self) -> SourceCounts {
        SourceCounts { dropped: self.lost.dropped(), skipped: self.lost.skipped(), ..SourceCounts::default() }
    }

    /// Since the last [`follow`](Source::follow); also for views of frames of before, which are detached like others.
    fn copies(&self) -> Vec<Copies> {
        let mut all = self.old_copies.clone();
        let frames = std::iter::once(&self.frames).chain(&self.old);
        frames.for_each(|frames| frames.account_for(&mut all));
        all.entries().to_vec()
    }
}

impl AsFd for Receiver {
    /// Readable when a frame or a message may be there.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.epoll.0.as_fd()
    }
}
