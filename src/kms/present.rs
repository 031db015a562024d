//! How frames get on screen: the first with a modeset, then every one in turn, or the newest.

use nix::libc;

use super::Display;
use super::atomic::{CommitFlags, explained};
use super::display::{Present, Way, joined};
use super::fenced::Sent;
use super::flip::Flip;
use super::import::Framebuffer;
use super::saved::Blob;
use super::setup::mode_bytes;
use super::verify::Verifier;
use crate::clock::now_us;
use crate::endpoint::{Refusal, Shown, Sink};
use crate::error::{Error, Kind, Result};
use crate::fence::CpuWait;
use crate::frame::Frame;

/// Longest wait for a page flip, in ms: the kernel itself gives up after 10 s (drm_atomic_helper_wait_for_flip_done).
pub(super) const FLIP_TIMEOUT_MS: u16 = 15_000;

impl Display {
    /// The first commit: mode, plane and framebuffer. Completed on return.
    pub(super) fn light(&mut self, frame: Frame) -> Result<Shown> {
        self.out_fence = None;
        self.acquire_first(&frame)?;
        let framebuffer = self.framebuffer(&frame)?;
        let way = joined(&mut self.way, &self.name)?;
        let mut mode = mode_bytes(&way.route);
        frame.lease().mark_pending();
        let flags = CommitFlags { allow_modeset: true, ..CommitFlags::default() };
        let blob = Blob::new(&self.card, &mut mode)?;
        way.setup
            .request(&way.route, framebuffer, blob.id)
            .commit(&self.card, flags, "show the first frame on")?;
        drop(blob);
        way.lit = true;
        let shown = self.replaced(frame, now_us());
        self.leaving = None;
        self.fence_use.went_well();
        if let (Some(Way { route, verifier: Some(verifier), .. }), Some(frame)) = (&mut self.way, &self.on_screen) {
            verifier.first(&self.card, route, frame)?;
        }
        Ok(shown)
    }

    /// One commit of the plane's framebuffer alone. `Ok(false)` if it must wait for an earlier one and was told not to.
    fn flip(&mut self, frame: &Frame, flags: CommitFlags) -> Result<bool> {
        match self.commit_flip(frame, flags, None)? {
            // An expected answer, of which no error is made: that would allocate.
            Err(cause) if flags.nonblock && cause.raw_os_error() == Some(libc::EBUSY) => Ok(false),
            other => explained(other, &self.card, "show a frame on").map(|()| true),
        }
    }

    /// Sends a frame to the screen as soon as the one before is there: one system call, and one lease given up. With fences a few more.
    pub(super) fn show_in_turn(&mut self, frame: Frame) -> Result<Option<Shown>> {
        // What is on its way may wait for a fence, without limit, and a commit that waits for it would too.
        let acquired = self.pending_acquired();
        acquired.inspect_err(|error| self.lose(error))?;
        let (on_its_way, event) = match frame.acquire_fence() {
            None => {
                let sent = self.send(&frame)?;
                self.fence_use.went_well();
                sent
            }
            Some(fence) => match self.send_fenced(&frame, fence)? {
                Sent::OnItsWay => (true, true),
                Sent::Acquired(why) => {
                    let sent = self.send(&frame)?;
                    self.fence_use.waited(why);
                    self.fence_use.went_well();
                    if let CpuWait::Refused(_) = why {
                        // It was the fence, and will be with the next.
                        self.by_cpu = self.by_cpu.or(Some(why));
                    }
                    sent
                }
            },
        };
        let meta = *frame.meta();
        // Either commit says that what was on its way is on screen, and so that what it replaced is not.
        if let Some(before) = self.pending.take() {
            self.put_on_screen(before);
        }
        match on_its_way {
            true => {
                self.pending = Some(frame);
                self.fifo.submitted(meta);
            }
            false => {
                self.put_on_screen(frame);
                // Such a commit is cleaned up when it returns: nobody reads what it replaced.
                self.leaving = None;
                self.fifo.arrived(&self.card, meta, event, self.period_us())?;
            }
        }
        let shown = self.fifo.next_shown(&self.card, usize::from(on_its_way))?;
        self.tell(shown)
    }

    /// Whether the frame is on its way, or otherwise on screen, and whether that has, or will have, an event.
    fn send(&mut self, frame: &Frame) -> Result<(bool, bool)> {
        let mut on_its_way = !self.each_waits() && !self.fifo.waits();
        if on_its_way && !self.flip(frame, CommitFlags { nonblock: true, event: true, ..CommitFlags::default() })? {
            self.fifo.refused();
            on_its_way = false;
        }
        let event = on_its_way || self.fifo.wants_event();
        if !on_its_way {
            self.flip(frame, CommitFlags { event, ..CommitFlags::default() })?;
        }
        Ok((on_its_way, event))
    }

    /// Whether each commit waits until its frame is on screen, since there are too few buffers to hold one that has left it.
    pub(super) fn each_waits(&self) -> bool {
        self.way.as_ref().is_some_and(|way| way.waits)
    }

    /// Shows a frame, waits until it is on screen, and verifies it.
    pub(super) fn show_verified(&mut self, frame: Frame) -> Result<Shown> {
        let waited = self.acquire_by_cpu(&frame)?;
        self.forget_crcs()?;
        self.flip(&frame, CommitFlags { event: true, ..CommitFlags::default() })?;
        self.fence_use.went_well();
        if waited {
            self.fence_use.waited(self.by_cpu.unwrap_or(CpuWait::Verified));
        }
        self.pending = Some(frame);
        self.wait_pending()
    }

    /// Nothing is on its way: what CRCs there are belong to pictures that were checked.
    fn forget_crcs(&mut self) -> Result<()> {
        let verifier = self.way.as_mut().and_then(|way| way.verifier.as_mut());
        verifier.map_or(Ok(()), Verifier::forget)
    }

    /// Waits until every frame sent is on screen and its event read, and tells of one.
    pub(super) fn finish_in_turn(&mut self) -> Result<Option<Shown>> {
        if !self.given_up {
            self.settle()?;
        }
        let told = self.fifo.told();
        self.tell(told)
    }

    /// Whether frames are sent one after the other without waiting for each.
    pub(super) fn in_turn(&self) -> bool {
        self.request.present == Present::Fifo && !self.request.verify
    }

    /// Waits until the pending frame is on screen. Until then, and if that fails, it stays pending, with its lease.
    pub(super) fn wait_pending(&mut self) -> Result<Shown> {
        let flip = self.card.wait_flip(FLIP_TIMEOUT_MS)?;
        let nothing = || Error::new(Kind::Invalid, "wait for a frame on", &self.name).because("none is pending");
        let frame = self.pending.take().ok_or_else(nothing)?;
        self.arrived(frame, flip)
    }

    /// Submits a frame and returns at once.
    pub(super) fn submit(&mut self, frame: Frame) -> Result<()> {
        self.forget_crcs()?;
        if !self.flip(&frame, CommitFlags { nonblock: true, event: true, ..CommitFlags::default() })? {
            let error = Error::from_io("show a frame on", &self.name, std::io::Error::from_raw_os_error(libc::EBUSY));
            return Err(error.repair("an earlier commit has not completed"));
        }
        self.pending = Some(frame);
        let period = self.period_us();
        let since_last = now_us().saturating_sub(self.last_flip_us);
        self.flip_due_us = self.last_flip_us + (since_last / period + 1) * period;
        Ok(())
    }

    /// The time from one flip to the next by the mode's refresh, in µs; 1 if that is not known.
    fn period_us(&self) -> u64 {
        self.way.as_ref().map_or(0, |way| way.route.period_us()).max(1)
    }

    /// Submits a frame if the one before is on screen and its fence has signalled, else keeps it, instead of one that waits already. A
    /// frame that is ready goes before older ones that are not; see [`Mailbox`](super::mailbox::Mailbox).
    pub(super) fn queue(&mut self, frame: Frame) -> Result<Option<Shown>> {
        // Before the look at the event, which submits what waits: that is to be the newest.
        let failed = self.mailbox.put(frame);
        self.tell_of_dropped(failed);
        if self.pending.is_none() {
            self.advance();
            return self.tell(None);
        }
        // A look at the wrong time would be a system call for nothing.
        if now_us() >= self.flip_due_us { self.dispatch() } else { self.tell(None) }
    }

    /// A frame has come on screen with a flip event.
    pub(super) fn arrived(&mut self, frame: Frame, flip: Flip) -> Result<Shown> {
        let verifier = self.way.as_mut().and_then(|way| way.verifier.as_mut());
        let checked = verifier.map_or(Ok(()), |verifier| verifier.check(&frame, flip));
        let shown = self.replaced(frame, flip.at_us);
        checked.map(|()| shown)
    }

    /// The lease of the frame that was on screen before ends here.
    fn replaced(&mut self, frame: Frame, at_us: u64) -> Shown {
        let shown = Shown { meta: *frame.meta(), at_us };
        self.last_flip_us = at_us;
        self.put_on_screen(frame);
        shown
    }

    /// Shows a frame that nobody counts, in place of what is on screen, and returns when it is there.
    pub(super) fn replace_picture(&mut self, frame: Frame) -> Result<()> {
        self.flip(&frame, CommitFlags::default())?;
        // Nobody presented this one.
        self.out_fence = None;
        self.put_on_screen(frame);
        self.leaving = None;
        Ok(())
    }

    /// What is on screen until now is given up, or, where the driver may still read it, held until the frame after this one comes here.
    pub(super) fn put_on_screen(&mut self, mut frame: Frame) {
        frame.lease().mark_on_screen();
        // It has signalled, or it would not be there.
        frame.acquired();
        let before = self.on_screen.replace(frame);
        self.leaving = before.filter(|_| self.way.as_ref().is_some_and(|way| way.holds));
        if let Some(leaving) = &self.leaving {
            leaving.lease().mark_left();
        }
    }

    /// The framebuffer of a frame's buffer, imported now if `join` has not seen it.
    pub(super) fn framebuffer(&mut self, frame: &Frame) -> Result<u32> {
        let imported = self.framebuffers.get(&mut self.importer, frame.buffer());
        let error = |refusal: Refusal| {
            let error = Error::new(Kind::Unsupported, "import a frame into", &self.name).said_by(refusal.step);
            error.because(refusal)
        };
        imported.map(Framebuffer::id).map_err(error)
    }
}
