//! Frames with acquire fences on their way to the screen: handed to the device, or waited for by the CPU.
//!
//! Nothing in the kernel gives up waiting for a fence, and a commit that waits cannot be taken back. So a commit that *itself* waits (a
//! blocking one) is made only when the fences of the frames before it have signalled, for which there is a time; and one that does not
//! wait is made with an open fence in fifo alone, where the frames after it have to wait anyhow.

use std::io;
use std::os::fd::AsFd;

use nix::libc;

use super::Card;
use super::Display;
use super::atomic::{CommitFlags, Request, explained};
use super::flip::wait_readable;
use super::present::FLIP_TIMEOUT_MS;
use super::route::Route;
use super::setup::Setup;
use crate::endpoint::{Shown, Sink};
use crate::error::{Error, Kind, Result};
use crate::fence::{CpuWait, SyncFile};
use crate::frame::{Frame, FrameMeta, Revoked};
use crate::memory::Access;

/// The commit of every frame after the first: the plane's framebuffer, and its fences.
#[derive(Debug)]
pub(super) struct FlipCommit {
    plain: Request,
    /// With a place for the fence.
    fenced: Option<Request>,
    out_fence: bool,
}

/// The places of values in both requests.
const FRAMEBUFFER: usize = 0;
const IN_FENCE: usize = 1;

impl FlipCommit {
    /// With `out_fence`, each commit gives a fence that signals when it is done, where the CRTC has such fences.
    pub(super) fn new(route: &Route, setup: &Setup, out_fence: bool) -> FlipCommit {
        let out_fence = setup.out_fence.filter(|_| out_fence);
        let finished = |mut request: Request| {
            if let Some(property) = out_fence {
                request.object(route.crtc).set(property, 0);
            }
            request
        };
        let mut plain = Request::default();
        plain.object(route.plane).set(setup.framebuffer, 0);
        let fenced = setup.in_fence.map(|property| {
            let mut fenced = plain.clone();
            fenced.set(property, 0);
            finished(fenced)
        });
        FlipCommit { plain: finished(plain), fenced, out_fence: out_fence.is_some() }
    }

    fn takes_fences(&self) -> bool {
        self.fenced.is_some()
    }

    /// One system call. Without a place for the fence it is left out. Also the commit's own fence, if it was asked for.
    ///
    /// # Errors
    /// The kernel's errno.
    fn commit(
        &mut self,
        card: &Card,
        framebuffer: u32,
        fence: Option<&SyncFile>,
        flags: CommitFlags,
    ) -> io::Result<Option<SyncFile>> {
        let request = match (fence, &mut self.fenced) {
            (Some(fence), Some(fenced)) => {
                // A descriptor is a small number that is not negative (drm_atomic_plane_set_property).
                fenced.set_at(IN_FENCE, fd_value(fence));
                fenced
            }
            _ => &mut self.plain,
        };
        request.set_at(FRAMEBUFFER, u64::from(framebuffer));
        if !self.out_fence {
            return request.try_commit(card, flags).map(|()| None);
        }
        let committed = out_fence_of(&mut |place| {
            request.set_last(place);
            request.try_commit(card, flags)
        });
        // The address was of a variable that is gone.
        request.set_last(0);
        committed
    }
}

fn fd_value(fence: &SyncFile) -> u64 {
    use std::os::fd::AsRawFd;
    i64::from(fence.as_fd().as_raw_fd()).cast_unsigned()
}

/// The fence that a commit gives (`OUT_FENCE_PTR`, `WRITEBACK_OUT_FENCE_PTR`): `commit` is called once with the value for the property.
/// `None` if the driver made none.
///
/// # Errors
/// What `commit` says.
pub(super) fn out_fence_of<E>(commit: &mut dyn FnMut(u64) -> Result<(), E>) -> Result<Option<SyncFile>, E> {
    let mut fence: i32 = -1;
    // The kernel writes a descriptor to this address before the commit returns (prepare_signaling), and no later: `fence` is alive until
    // then, and has the kernel's `s32`.
    commit((&raw mut fence).expose_provenance() as u64)?;
    // SAFETY: the commit succeeded, so `fence` is a new descriptor that nobody else owns (complete_signaling), unless the driver made
    // none and left it at -1.
    Ok(unsafe { SyncFile::from_raw(fence) })
}

/// What became of a frame with a fence.
pub(super) enum Sent {
    /// It is on its way, and the device waits for its fence.
    OnItsWay,
    /// It has still to be sent. Its fence has signalled, for which this process has waited.
    Acquired(CpuWait),
}

impl Display {
    /// The fence of the frame submitted last, which signals when that frame is on screen, and which frame that is: the CRTC's
    /// [`OUT_FENCE_PTR`](https://docs.kernel.org/gpu/drm-kms.html#explicit-fencing-properties). In a mailbox that need not be the frame
    /// presented last, which may be held back. Taken once; `None` before the second frame, after a commit that failed, and if
    /// [`DisplayRequest::out_fences`](super::DisplayRequest::out_fences) was not set.
    ///
    /// It says nothing of the frame that was there before: the display gives that up by itself.
    pub fn take_out_fence(&mut self) -> Option<(FrameMeta, SyncFile)> {
        self.out_fence.take()
    }

    /// One commit of the plane's framebuffer alone, with the fence that the device is to wait for. The outer error is of the import.
    pub(super) fn commit_flip(
        &mut self,
        frame: &Frame,
        flags: CommitFlags,
        fence: Option<&SyncFile>,
    ) -> Result<io::Result<()>> {
        // That of a frame before says nothing of this one.
        self.out_fence = None;
        let framebuffer = self.framebuffer(frame)?;
        let way = super::display::joined(&mut self.way, &self.name)?;
        frame.lease().mark_pending();
        let committed = way.flip.commit(&self.card, framebuffer, fence, flags);
        Ok(committed.map(|out| self.out_fence = out.map(|out| (*frame.meta(), out))))
    }

    /// The frame at hand is dropped, for its fence or that of the one before.
    pub(super) fn lose(&mut self, error: &Error) {
        self.lost += 1;
        self.fence_use.lose(error);
    }

    /// Waits by the CPU for a frame's fence; without one no system call. Whether it had one.
    ///
    /// # Errors
    /// As [`Frame::wait_acquired`]: the frame counts as dropped.
    pub(super) fn acquire_by_cpu(&mut self, frame: &Frame) -> Result<bool> {
        let Some(fence) = frame.acquire_fence() else { return Ok(false) };
        let acquired = fence.wait(self.fence_timeout());
        acquired.map(|()| true).inspect_err(|error| self.lose(error))
    }

    /// Waits for all fences of the first frame: its commit waits, whatever is asked. Also for those that are in its memory, for which
    /// the kernel would wait without limit.
    pub(super) fn acquire_first(&mut self, frame: &Frame) -> Result<()> {
        let waited = self.acquire_by_cpu(frame)?;
        for dma_buf in (0u32..).map_while(|memory| frame.buffer().dma_buf(memory)) {
            // Before Linux 6.0 they cannot be asked for, and the kernel waits.
            let Ok(fence) = SyncFile::export(dma_buf, Access::Read) else { continue };
            match fence.wait(self.fence_timeout()) {
                Err(late) if late.kind() == Kind::Timeout => {
                    self.lose(&late);
                    return Err(late);
                }
                // Work that failed some time ago says nothing of what the source has put there since.
                _ => {}
            }
        }
        if waited {
            self.fence_use.waited(self.by_cpu.unwrap_or(CpuWait::First));
        }
        Ok(())
    }

    /// Waits until the frame that is on its way waits for no fence any more; without one no system call. That its work has failed is
    /// [told later](Display::tell_later), once: the kernel shows the frame all the same (`drm_atomic_helper_wait_for_fences`), and those
    /// after it are as good as any.
    ///
    /// # Errors
    /// [`Kind::Timeout`].
    pub(super) fn pending_acquired(&mut self) -> Result<()> {
        let timeout = self.fence_timeout();
        let Some(frame) = self.pending.as_mut().filter(|frame| frame.acquire_fence().is_some()) else { return Ok(()) };
        match frame.wait_acquired(timeout) {
            Err(late) if late.kind() == Kind::Timeout => Err(late),
            acquired => {
                match &acquired {
                    Ok(()) => self.fence_use.went_well(),
                    Err(error) => self.fence_use.lose(error),
                }
                frame.acquired();
                self.tell_later(acquired);
                Ok(())
            }
        }
    }

    /// In fifo: why a frame's fence is waited for by the CPU, as far as that is known before its commit.
    pub(super) fn waits_by_cpu(&self) -> Option<CpuWait> {
        // A commit that waits would wait for the fence too, without limit.
        let each_waits = self.each_waits().then_some(CpuWait::Buffers);
        let missing = || self.way.as_ref().is_some_and(|way| !way.flip.takes_fences());
        self.by_cpu.or(each_waits).or_else(|| missing().then_some(CpuWait::Missing))
    }

    /// In fifo: sends a frame with the fence that the device is to wait for, or waits for it by the CPU.
    pub(super) fn send_fenced(&mut self, frame: &Frame, fence: &SyncFile) -> Result<Sent> {
        if let Some(why) = self.waits_by_cpu() {
            return self.acquire_by_cpu(frame).map(|_| Sent::Acquired(why));
        }
        // A commit that waits would wait for this frame's fence as well, without limit and with the card's locks held; so what is on its
        // way is waited for, where a commit that does not wait is of no use.
        if self.fifo.waits() {
            self.settle()?;
        }
        let flags = CommitFlags { nonblock: true, event: true, ..CommitFlags::default() };
        let mut sent = self.commit_flip(frame, flags, Some(fence))?;
        if busy(&sent) {
            self.fifo.refused();
            self.settle()?;
            sent = self.commit_flip(frame, flags, Some(fence))?;
        }
        match sent {
            Ok(()) => {
                self.fence_use.by_device += 1;
                Ok(Sent::OnItsWay)
            }
            // EPERM is nvidia-drm's (before 560), EINVAL a check of others. The frame is sent again without its fence: if it was not to
            // blame, that says so. A device that is gone says EINVAL as well, and is not waited for.
            Err(cause) => match cause.raw_os_error() {
                Some(errno @ (libc::EPERM | libc::EINVAL | libc::EOPNOTSUPP | libc::EBUSY)) if !self.card.is_gone() => {
                    self.acquire_by_cpu(frame)?;
                    Ok(Sent::Acquired(match errno {
                        libc::EBUSY => CpuWait::Busy,
                        errno => CpuWait::Refused(errno),
                    }))
                }
                _ => explained(Err(cause), &self.card, "show a frame on").map(|()| Sent::OnItsWay),
            },
        }
    }

    /// In fifo: waits until every frame sent is on screen and its event read.
    pub(super) fn settle(&mut self) -> Result<()> {
        self.pending_acquired()?;
        while !self.fifo.all_read() {
            self.fifo.read(&self.card)?;
            if !self.fifo.all_read() {
                wait_readable(&*self.card, FLIP_TIMEOUT_MS, "get a page flip from", &self.name)?;
            }
        }
        if let Some(frame) = self.pending.take() {
            self.put_on_screen(frame);
        }
        Ok(())
    }

    /// Keeps what went wrong with another frame than the one that is asked for, to be told with the next call that has nothing to show.
    /// The first of several: each frame of the others is counted.
    pub(super) fn tell_later(&mut self, went: Result<()>) {
        if let Err(error) = went
            && self.untold.is_none()
        {
            self.untold = Some(error);
        }
    }

    /// What has come on screen, or else what went wrong before: neither is lost for the other.
    pub(super) fn tell(&mut self, shown: Option<Shown>) -> Result<Option<Shown>> {
        match shown {
            None => self.untold.take().map_or(Ok(None), Err),
            shown => Ok(shown),
        }
    }

    /// In mailbox: frames that were dropped for their fences, which is told later.
    pub(super) fn tell_of_dropped(&mut self, failures: Vec<Error>) {
        for error in failures {
            self.fence_use.lose(&error);
            self.tell_later(Err(error));
        }
    }

    /// In mailbox: submits the newest frame that is ready, if nothing is on its way. Drops frames whose fences have failed or taken too
    /// long, which is [told later](Display::tell_later), as is what the commit says.
    pub(super) fn advance(&mut self) {
        let failed = self.mailbox.look();
        self.tell_of_dropped(failed);
        if self.pending.is_none()
            && let Some(frame) = self.mailbox.take_ready()
        {
            match frame.check() {
                Ok(()) => self.submit_newest(frame),
                // Who shares it has taken it back while it waited here.
                Err(Revoked) => self.lost += 1,
            }
        }
        let late = self.mailbox.check_time(self.fence_timeout());
        self.tell_of_dropped(late);
    }

    fn submit_newest(&mut self, frame: Frame) {
        let had_fence = frame.acquire_fence().is_some();
        let submitted = self.submit(frame);
        if submitted.is_ok() {
            self.fence_use.went_well();
            if had_fence {
                self.fence_use.waited(match self.request.verify {
                    true => CpuWait::Verified,
                    false => CpuWait::Mailbox,
                });
            }
        }
        self.tell_later(submitted);
    }

    /// In mailbox: waits for the next frame that is on its way or held, until it is on screen. Failures come after the last of them.
    pub(super) fn finish_newest(&mut self) -> Result<Option<Shown>> {
        // Each round submits a frame or drops one.
        while self.pending.is_none() && !self.mailbox.is_empty() {
            let failed = self.mailbox.wait(self.fence_timeout());
            self.tell_of_dropped(failed);
            self.advance();
        }
        if self.pending.is_none() {
            return self.tell(None);
        }
        let shown = self.wait_pending()?;
        self.advance();
        Ok(Some(shown))
    }
}

fn busy(sent: &io::Result<()>) -> bool {
    sent.as_ref().is_err_and(|cause| cause.raw_os_error() == Some(libc::EBUSY))
}
