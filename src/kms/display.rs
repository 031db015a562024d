//! One display as a sink: imports once, shows frame after frame, and puts back what was there before.

use std::os::fd::{AsFd, BorrowedFd};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::libc;

use super::atomic::CommitFlags;
use super::fenced::FlipCommit;
use super::fifo::Fifo;
use super::import::{Framebuffer, KmsImporter};
use super::mailbox::Mailbox;
use super::plug::Plug;
use super::quirks::{fails_with_fences, reads_late, shown_wrong, stride_align};
use super::route::Route;
use super::saved::{Blob, Saved};
use super::setup::{Setup, mode_bytes};
use super::verify::Verifier;
use super::{Card, Snapshot};
use crate::causes::{Call, Cause};
use crate::endpoint::{ImportCache, JoinError, Refusal, Rung, Shown, Sink, Verdict};
use crate::error::{Error, Kind, Result};
use crate::fence::{CpuWait, FenceUse, PATIENCE, SyncFile};
use crate::format::{Format, Layout};
use crate::frame::{Buffer, Frame, FrameMeta, Room};
use crate::ledger::Ledger;

/// What happens to frames that come faster than the display shows them.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub enum Present {
    /// Every frame is shown. Presenting waits until the frame *before* is on screen, which it is unless frames come faster than
    /// the display shows them; what was shown is told some frames later, with the time at which it was. A frame whose acquire fence has
    /// not signalled is handed to the driver with it, and the frames after it wait.
    #[default]
    Fifo,
    /// The newest frame is shown; presenting never waits, and a frame that waits is dropped for a newer one. A frame whose acquire fence
    /// has not signalled is held back, and does not stand in the way of newer ones that are ready. Every such frame is held, until a newer
    /// one is shown: before its fence has signalled its buffer cannot be filled anyway. So of the buffers that no other device is busy with
    /// the display takes three, as without fences: on screen, on its way, and ready.
    Mailbox,
}

/// How a display is used.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct DisplayRequest {
    /// What happens to frames that come too fast.
    pub present: Present,
    /// Whether each picture shown is compared with what was captured. For that the CPU reads each frame when it comes, so its fence is
    /// waited for then, in a mailbox too.
    pub verify: bool,
    /// Strides must be a multiple of so many bytes, whatever the driver says: for displays that show a wrong picture instead of refusing
    /// one. `None` for what is known of the driver (256 for AMD's), 1 for nothing.
    pub stride_align: Option<u32>,
    /// How long the acquire fence of a frame may take to signal; then it is an error that names it. `None` for
    /// [`PATIENCE`](crate::fence::PATIENCE), 5 s.
    pub fence_timeout: Option<Duration>,
    /// Whether this process waits for acquire fences where it could have the driver wait (`IN_FENCE_FD`): for drivers that fail with
    /// them. What is known of the driver, or turns out when it refuses one, has the same effect;
    /// [`fence_use`](Sink::fence_use) tells.
    pub wait_by_cpu: bool,
    /// Whether each frame after the first has a fence that signals when it is on screen: [`Display::take_out_fence`]. Costs a descriptor
    /// for each frame.
    pub out_fences: bool,
}

/// A display: one connector of a card, driven by this process.
///
/// It holds the lease of the frame on screen and of the one that is about to be; a lease is given up when the commit that
/// *replaced* the frame has completed, so that its frames need no release fences. Dropping the display puts back what was on screen
/// before, also after an error or while a panic unwinds; when the process is killed, the kernel turns its picture off.
#[derive(Debug)]
pub struct Display {
    pub(super) card: Arc<Card>,
    pub(super) name: String,
    pub(super) request: DisplayRequest,
    pub(super) importer: KmsImporter,
    pub(super) way: Option<Way>,
    // Before the frames: dropped in this order, so that a framebuffer has left the screen when its frame's lease ends.
    pub(super) framebuffers: ImportCache<Framebuffer>,
    pub(super) on_screen: Option<Frame>,
    /// The frame that was on screen before, while the driver may still read it.
    pub(super) leaving: Option<Frame>,
    pub(super) pending: Option<Frame>,
    pub(super) mailbox: Mailbox,
    pub(super) fifo: Fifo,
    /// Imports made before the join that holds.
    imports_before: u64,
    /// What verification found on ways that were left.
    verified: Verdict,
    pub(super) ledger: Ledger,
    pub(super) fence_use: FenceUse,
    /// Why fences are not handed to the driver.
    pub(super) by_cpu: Option<CpuWait>,
    /// Of the commit of this frame.
    pub(super) out_fence: Option<(FrameMeta, SyncFile)>,
    /// Frames that were dropped for their own fence or that of the one before, beside the mailbox's.
    pub(super) lost: u64,
    /// What went wrong with a frame, while another call had something else to tell.
    pub(super) untold: Option<Error>,
    /// What is on its way is not waited for: its fence has not signalled, and the flow has ended.
    pub(super) given_up: bool,
    /// Since when the picture of before is to be put back, and a fence is in the way.
    pub(super) restoring_since: Option<Instant>,
    /// When the last frame came on screen, and when the pending one is expected to, by the mode's refresh; µs of `CLOCK_MONOTONIC`.
    pub(super) last_flip_us: u64,
    pub(super) flip_due_us: u64,
}

/// So many buffers are enough to hold one more frame: that frame, the one on screen, the one on its way, and one to fill.
const HOLDING: usize = 4;

/// The way to the screen that `join` has found.
#[derive(Debug)]
pub(super) struct Way {
    pub route: Route,
    /// Everything but the framebuffer and the mode.
    pub setup: Setup,
    /// The framebuffer of the plane: the request of every frame after the first.
    pub flip: FlipCommit,
    saved: Saved,
    /// Whether the screen shows frames of ours that came this way.
    pub lit: bool,
    /// Whether a frame is held until the commit after the next, since the driver [reads late](super::quirks::reads_late).
    pub holds: bool,
    /// Whether each commit waits instead, since there are too few buffers to hold one.
    pub waits: bool,
    /// Whether something is connected there.
    pub plug: Option<Plug>,
    /// Whether it shows one that came another way, and so must be put back all the same.
    left: bool,
    pub verifier: Option<Verifier>,
}

impl Display {
    /// Opens the display that a person calls `name` ([`Card::find`]) and becomes its DRM master. Changes nothing on screen.
    ///
    /// # Errors
    /// As [`Card::find`]; [`Kind::Busy`] if another process drives it.
    pub fn find(name: &str, request: DisplayRequest) -> Result<Display> {
        Display::open(Card::find(name)?, request)
    }

    /// Takes over an open card and becomes its DRM master. Changes nothing on screen.
    ///
    /// # Errors
    /// [`Kind::Busy`] if another process drives it.
    pub fn open(card: Card, request: DisplayRequest) -> Result<Display> {
        card.become_master()?;
        let card = Arc::new(card);
        let by_cpu = match request.wait_by_cpu {
            true => Some(CpuWait::Asked),
            false => fails_with_fences(&card).then_some(CpuWait::Driver),
        };
        Ok(Display {
            name: card.name(),
            request,
            importer: KmsImporter::new(Arc::clone(&card)),
            card,
            way: None,
            on_screen: None,
            leaving: None,
            pending: None,
            mailbox: Mailbox::default(),
            fifo: Fifo::new(),
            imports_before: 0,
            verified: Verdict::default(),
            ledger: Ledger::new(),
            fence_use: FenceUse::default(),
            by_cpu,
            out_fence: None,
            lost: 0,
            untold: None,
            given_up: false,
            restoring_since: None,
            last_flip_us: 0,
            flip_due_us: 0,
            framebuffers: ImportCache::new(),
        })
    }

    /// The card.
    pub fn card(&self) -> &Card {
        &self.card
    }

    /// The connector and mode in use, once joined: `Virtual-1 640x480`.
    pub fn mode(&self) -> Option<String> {
        let way = self.way.as_ref()?;
        let (width, height) = way.route.mode_size();
        Some(format!("{} {width}x{height}", way.route.connector_name))
    }

    /// What the display shows now.
    ///
    /// # Errors
    /// As [`Snapshot::take`].
    pub fn snapshot(&self) -> Result<Snapshot> {
        Snapshot::take(&self.card, None)
    }

    /// Puts back what was on screen before, and gives up every frame. Dropping does the same and cannot report a failure.
    ///
    /// Where the kernel waits for the fence of a frame that is on its way, which cannot be taken back, this waits for it as well, three
    /// times [`fence_timeout`](DisplayRequest::fence_timeout) at most in all. If it has not signalled by then, dropping the display leaves
    /// that frame to the kernel, which shows it when it has: its slot and that of the frame on screen are not filled again, and the card
    /// stays open, while this process lives. When it exits, the kernel waits for the fence before Linux 6.8, and where its console comes
    /// back on that card.
    ///
    /// # Errors
    /// The kernel's refusal, for example if another process became DRM master; [`Kind::Timeout`] for such a fence.
    pub fn restore(&mut self) -> Result<()> {
        self.mailbox.clear();
        self.wait_for_pending()?;
        let restored = match &mut self.way {
            Some(way) if way.lit || way.left => {
                if let Some(verifier) = &mut way.verifier {
                    verifier.end();
                }
                // Blocks until a pending flip is done, so that no frame is given up while it is on its way to the screen.
                let restored = way.saved.restore(&self.card);
                (way.lit, way.left) = (restored.is_err(), false);
                restored
            }
            _ => Ok(()),
        };
        // Otherwise a frame may still be on screen; it is given up after its framebuffer, when the display is dropped.
        if restored.is_ok() {
            (self.pending, self.on_screen, self.leaving, self.out_fence) = (None, None, None, None);
            (self.untold, self.given_up, self.restoring_since) = (None, false, None);
            // The event of a flip that was pending is there by now, and is of no frame that comes later.
            while let Ok(Some(_)) = self.card.read_flip() {}
            self.fifo.clear();
        }
        restored
    }

    fn stride_align(&self) -> u32 {
        self.request.stride_align.unwrap_or_else(|| stride_align(&self.card)).max(1)
    }

    /// The way of before is given up for another, which the first frame will take; until then the picture stays. What was on screen
    /// before both is what is put back at the end.
    fn leave(&mut self, mut before: Way, next: &mut Way) -> Result<()> {
        if let Some(mut verifier) = before.verifier.take() {
            verifier.end();
            self.verified.add(verifier.verdict());
        }
        if !before.lit && !before.left {
            return Ok(());
        }
        if before.route.crtc == next.route.crtc && before.route.connector == next.route.connector {
            next.saved = before.saved;
            next.saved.turn_off(&self.card, next.route.plane)?;
            next.left = true;
            return Ok(());
        }
        // Another output: the one of before goes back to what it was, and what `choose` has saved of the next holds still.
        self.way = Some(before);
        let restored = self.restore();
        self.way = None;
        restored
    }

    /// The first way that the driver agrees to, tried with a real framebuffer.
    fn choose(&self, routes: Vec<Route>, layout: &Layout, buffer: &Buffer) -> Result<Way, JoinError> {
        let mut refused = None;
        for route in routes {
            let setup = Setup::new(&self.card, &route, layout)?;
            let mut mode = mode_bytes(&route);
            let blob = Blob::new(&self.card, &mut mode)?;
            let framebuffer = self.framebuffers.peek(buffer).map_or(0, Framebuffer::id);
            let flags = CommitFlags { test_only: true, allow_modeset: true, ..CommitFlags::default() };
            match setup.request(&route, framebuffer, blob.id).try_commit(&self.card, flags) {
                Ok(()) => {
                    let flip = FlipCommit::new(&route, &setup, self.request.out_fences);
                    let saved = Saved::read(&self.card, &route)?;
                    let plug = Plug::new(&self.card, &route.connector_name);
                    return Ok(Way {
                        route,
                        setup,
                        flip,
                        saved,
                        lit: false,
                        left: false,
                        holds: false,
                        waits: false,
                        plug,
                        verifier: None,
                    });
                }
                Err(cause) => refused = Some((route, cause)),
            }
        }
        let Some((route, cause)) = refused else {
            return Err(Error::new(Kind::NotFound, "find a way to the screen of", &self.name).into());
        };
        if cause.raw_os_error() == Some(libc::EACCES) {
            return Err(Error::from_io("set a mode on", &self.name, cause).into());
        }
        let errno = cause.raw_os_error();
        let Cause { why, repair } = Call::Commit.cause(errno.unwrap_or(0));
        Err(JoinError::Refused(Refusal {
            rung: Rung::Exported,
            step: "atomic test commit",
            errno,
            why: format!("{why} ({layout} on plane {} of {})", route.plane, route.connector_name),
            repair: repair.to_owned(),
        }))
    }
}

pub(super) fn joined<'a>(way: &'a mut Option<Way>, name: &str) -> Result<&'a mut Way> {
    let not = || Error::new(Kind::Invalid, "show a frame on", name).because("no source was joined to it");
    way.as_mut().ok_or_else(not)
}

impl Sink for Display {
    fn name(&self) -> &str {
        &self.name
    }

    fn formats(&self) -> Option<Vec<Format>> {
        Some(self.card.formats().unwrap_or_default())
    }

    fn join(&mut self, layout: &Layout, rate: Option<f64>, buffers: &[Buffer]) -> Result<Rung, JoinError> {
        if self.pending.is_some() || !self.mailbox.is_empty() {
            let error = Error::new(Kind::Invalid, "join another source to", &self.name);
            return Err(error
                .because("frames are on their way to it")
                .repair("finish them first")
                .into());
        }
        let lit = self.way.as_ref().filter(|way| way.lit || way.left);
        let keep = lit.map(|way| &way.route);
        let routes = Route::candidates(&self.card, layout, rate, keep)?;
        if let Some(refusal) = shown_wrong(&self.card, layout, self.stride_align()) {
            return Err(refusal.into());
        }
        for buffer in buffers {
            self.framebuffers.get(&mut self.importer, buffer)?;
        }
        let Some(buffer) = buffers.first() else {
            return Err(Error::new(Kind::Invalid, "join no buffers to", &self.name).into());
        };
        let mut way = self.choose(routes, layout, buffer)?;
        if self.request.verify {
            way.verifier = Some(Verifier::new(&self.card, &way.route, layout)?);
        }
        if let Some(before) = self.way.take() {
            self.leave(before, &mut way)?;
        }
        let late = self.in_turn() && reads_late(&self.card);
        way.holds = late && buffers.len() >= HOLDING;
        way.waits = late && !way.holds;
        self.way = Some(way);
        // Those of this join: some of its buffers may have been imported by one before.
        self.imports_before = self.framebuffers.imports().saturating_sub(buffers.len() as u64);
        Ok(Rung::Exported)
    }

    fn allocate(&mut self, layout: &Layout, room: &Room, count: u32) -> Result<Vec<Buffer>> {
        let align = self.stride_align();
        (0..count).map(|_| self.card.make_buffer(layout, room, align)).collect()
    }

    fn card_node(&self) -> Option<&Path> {
        Some(&self.card.info().path)
    }

    fn inspect(&mut self, frame: &Frame, place: u64) -> Result<()> {
        let timeout = self.fence_timeout();
        match self.way.as_mut().and_then(|way| way.verifier.as_mut()) {
            Some(verifier) => {
                frame.wait_acquired(timeout)?;
                verifier.expect(frame, place)
            }
            None => Ok(()),
        }
    }

    fn present(&mut self, frame: Frame) -> Result<Option<Shown>> {
        self.given_up = false;
        frame.check()?;
        if !joined(&mut self.way, &self.name)?.lit {
            return self.light(frame).map(Some);
        }
        match self.request.present {
            Present::Fifo if self.in_turn() => self.show_in_turn(frame),
            Present::Fifo => self.show_verified(frame).map(Some),
            Present::Mailbox => self.queue(frame),
        }
    }

    fn event_fd(&self) -> Option<BorrowedFd<'_>> {
        (self.request.present == Present::Mailbox).then(|| self.card.as_fd())
    }

    fn wants_event(&self) -> bool {
        self.mailbox.is_ready()
    }

    fn acquire_fences(&self) -> Vec<BorrowedFd<'_>> {
        self.mailbox.fences()
    }

    fn untold(&mut self) -> Option<Error> {
        self.untold.take()
    }

    fn acquire_time_left(&self) -> Option<Duration> {
        // What has still to be told is to be asked for at once.
        let untold = self.untold.as_ref().map(|_| Duration::ZERO);
        untold.or_else(|| self.mailbox.time_left(self.fence_timeout()))
    }

    fn waits_for<'a>(&'a self, next: Option<&'a Frame>) -> Vec<&'a SyncFile> {
        self.fences_before(next)
    }

    fn fence_timeout(&self) -> Duration {
        self.request.fence_timeout.unwrap_or(PATIENCE)
    }

    fn give_up(&mut self) {
        self.give_up_fenced();
    }

    fn fence_use(&self) -> FenceUse {
        self.fence_use
    }

    fn dispatch(&mut self) -> Result<Option<Shown>> {
        if self.in_turn() {
            self.fifo.read(&self.card)?;
            if self.fifo.all_read() {
                // That its fence has signalled is certain now, and not that its work has succeeded.
                self.pending_acquired()?;
                if let Some(frame) = self.pending.take() {
                    self.put_on_screen(frame);
                }
            }
            let told = self.fifo.told();
            return self.tell(told);
        }
        let shown = match self.card.read_flip()? {
            Some(flip) => self.pending.take().map(|frame| self.arrived(frame, flip)).transpose()?,
            None => None,
        };
        self.advance();
        self.tell(shown)
    }

    fn finish(&mut self) -> Result<Option<Shown>> {
        if self.in_turn() {
            return self.finish_in_turn();
        }
        self.finish_newest()
    }

    fn news(&mut self) -> Option<String> {
        self.way.as_mut()?.plug.as_mut()?.news()
    }

    fn dropped(&self) -> u64 {
        self.mailbox.dropped() + self.lost
    }

    fn imports(&self) -> u64 {
        self.framebuffers.imports() - self.imports_before
    }

    fn ledger(&self) -> &Ledger {
        &self.ledger
    }

    fn hold(&mut self) -> Result<()> {
        self.keep_picture()
    }

    fn verdict(&self) -> Option<Verdict> {
        let now = self.way.as_ref()?.verifier.as_ref().map(Verifier::verdict)?;
        let mut all = self.verified;
        all.add(now);
        Some(all)
    }
}

impl AsFd for Display {
    /// Readable when a frame has come on screen: [`dispatch`](Sink::dispatch) tells which.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.card.as_fd()
    }
}

impl Drop for Display {
    fn drop(&mut self) {
        // Nobody can act on a failure here; `restore` is for those who want to know.
        if self.restore().is_err() && self.is_stuck() {
            self.abandon();
        }
    }
}
