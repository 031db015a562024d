//! Frames with acquire fences on their way to the screen: handed to the device, or waited for by the CPU.
//!
//! Nothing in the kernel gives up waiting for a fence, and a commit that waits cannot be taken back. So a commit that *itself* waits (a
//! blocking one) is made only when the fences of the frames before it have signalled, for which there is a time; and one that does not
//! wait is made with an open fence in fifo alone, where the frames after it have to wait anyhow.

use std::io;
use std::os::fd::AsFd;
use std::time::Duration;

use nix::libc;

use super::Card;
use super::Display;
use super::atomic::{CommitFlags, Request, explained};
use super::flip::wait_readable;
use super::present::FLIP_TIMEOUT_MS;
use super::route::Route;
use super::setup::Setup;
use crate::endpoint::Shown;
use crate::error::{Kind, Result};
use crate::fence::{CpuWait, PATIENCE, SyncFile};
use crate::frame::Frame;
use crate::memory::Access;

/// How long the picture of before waits to be put back, while the kernel waits for the fence of a frame: longer than drivers let a job
/// run, and than the 10 s after which vgem's fences signal by themselves.
const RESTORE_PATIENCE: Duration = Duration::from_secs(15);

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
    use std::os::fd::{FromRawFd, OwnedFd};
    let mut fence: i32 = -1;
    // The kernel writes a descriptor to this address before the commit returns (prepare_signaling), and no later: `fence` is alive until
    // then, and has the kernel's `s32`.
    commit((&raw mut fence).expose_provenance() as u64)?;
    // SAFETY: the commit succeeded, so `fence` is a new descriptor that nobody else owns (complete_signaling), unless the driver made
    // none and left it at -1, which is no descriptor.
    Ok((fence >= 0).then(|| SyncFile::from(unsafe { OwnedFd::from_raw_fd(fence) })))
}

/// What became of a frame with a fence.
pub(super) enum Sent {
    /// It is on its way, and the device waits for its fence.
    OnItsWay,
    /// It has still to be sent. Its fence has signalled; that the device was not to wait, or, with its errno, refused to.
    Acquired(Option<i32>),
}

impl Display {
    /// How long a fence is waited for.
    pub(super) fn fence_timeout(&self) -> Duration {
        self.request.fence_timeout.unwrap_or(PATIENCE)
    }

    /// The fence of the last frame submitted, which signals when that frame is on screen: the CRTC's
    /// [`OUT_FENCE_PTR`](https://docs.kernel.org/gpu/drm-kms.html#explicit-fencing-properties). Taken once; `None` before the second
    /// frame, or if [`DisplayRequest::out_fences`](super::DisplayRequest::out_fences) was not set.
    ///
    /// It says nothing of the frame that was there before: the display gives that up by itself.
    pub fn take_out_fence(&mut self) -> Option<SyncFile> {
        self.out_fence.take()
    }

    /// One commit of the plane's framebuffer alone, with the fence that the device is to wait for. The outer error is of the import.
    pub(super) fn commit_flip(
        &mut self,
        frame: &Frame,
        flags: CommitFlags,
        fence: Option<&SyncFile>,
    ) -> Result<io::Result<()>> {
        let framebuffer = self.framebuffer(frame)?;
        let way = super::display::joined(&mut self.way, &self.name)?;
        frame.lease().mark_pending();
        Ok(way.flip.commit(&self.card, framebuffer, fence, flags).map(|out| {
            if out.is_some() {
                self.out_fence = out;
            }
        }))
    }

    /// Waits by the CPU for a frame's fence; without one no system call.
    pub(super) fn acquire_by_cpu(&mut self, frame: &Frame, why: CpuWait) -> Result<()> {
        let Some(fence) = frame.acquire_fence() else { return Ok(()) };
        fence.wait(self.fence_timeout())?;
        self.fence_use.waited(why);
        Ok(())
    }

    /// Waits for all fences of the first frame: its commit waits, whatever is asked. Also for those that are in its memory, for which
    /// the kernel would wait without limit.
    pub(super) fn acquire_first(&mut self, frame: &Frame) -> Result<()> {
        self.acquire_by_cpu(frame, self.by_cpu.unwrap_or(CpuWait::First))?;
        for dma_buf in (0u32..).map_while(|memory| frame.buffer().dma_buf(memory)) {
            // Before Linux 6.0 they cannot be asked for, and the kernel waits.
            let Ok(fence) = SyncFile::export(dma_buf, Access::Read) else { continue };
            match fence.wait(self.fence_timeout()) {
                Err(late) if late.kind() == Kind::Timeout => return Err(late),
                // Work that failed some time ago says nothing of what the source has put there since.
                _ => {}
            }
        }
        Ok(())
    }

    /// Waits until the frame that is on its way waits for no fence any more; without one no system call.
    ///
    /// # Errors
    /// As [`Frame::wait_acquired`]. That the work has failed is told once: the kernel shows the frame all the same
    /// (`drm_atomic_helper_wait_for_fences`), and those after it are as good as any.
    pub(super) fn pending_acquired(&mut self) -> Result<()> {
        let timeout = self.fence_timeout();
        let Some(frame) = &mut self.pending else { return Ok(()) };
        let acquired = frame.wait_acquired(timeout);
        if !matches!(&acquired, Err(late) if late.kind() == Kind::Timeout) {
            frame.acquired();
        }
        acquired
    }

    /// In fifo: sends a frame with the fence that the device is to wait for, or waits for it by the CPU.
    pub(super) fn send_fenced(&mut self, frame: &Frame, fence: &SyncFile) -> Result<Sent> {
        // A commit that waits would wait for the fence too, without limit.
        let each_waits = self.each_waits().then_some(CpuWait::Buffers);
        if let Some(why) = self.by_cpu.or(each_waits) {
            return self.acquire_by_cpu(frame, why).map(|()| Sent::Acquired(None));
        }
        if self.way.as_ref().is_some_and(|way| !way.flip.takes_fences()) {
            return self.acquire_by_cpu(frame, CpuWait::Missing).map(|()| Sent::Acquired(None));
        }
        let flags = CommitFlags { nonblock: true, event: true, ..CommitFlags::default() };
        let mut sent = self.commit_flip(frame, flags, Some(fence))?;
        if busy(&sent) {
            // A commit that waits would wait for this frame's fence as well, without limit and with the card's locks held.
            self.settle()?;
            sent = self.commit_flip(frame, flags, Some(fence))?;
        }
        match sent {
            Ok(()) => {
                self.fence_use.by_device += 1;
                Ok(Sent::OnItsWay)
            }
            // EPERM is nvidia-drm's (before 560), EINVAL a check of others. The frame is sent again without its fence: if it was not to
            // blame, that says so.
            Err(cause) => match cause.raw_os_error() {
                Some(errno @ (libc::EPERM | libc::EINVAL | libc::EOPNOTSUPP | libc::EBUSY)) => {
                    self.acquire_by_cpu(frame, CpuWait::Refused(errno))?;
                    Ok(Sent::Acquired((errno != libc::EBUSY).then_some(errno)))
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

    /// Before a commit that waits for everything on its way: that this will come to an end.
    pub(super) fn can_restore(&self) -> Result<()> {
        let pending = self.pending.as_ref().and_then(Frame::acquire_fence);
        match pending.map(|fence| (fence, fence.wait(RESTORE_PATIENCE))) {
            // One whose work has failed has signalled.
            Some((fence, Err(error))) if !fence.is_signalled() => {
                Err(error.repair("the kernel cannot put back the picture before that frame has been shown"))
            }
            _ => Ok(()),
        }
    }

    /// In mailbox: submits the newest frame that is ready, if nothing is on its way.
    ///
    /// # Errors
    /// What the commit says; if a fence has not signalled in time, or what it stands for has failed: its frame is dropped.
    pub(super) fn advance(&mut self) -> Result<()> {
        self.mailbox.look()?;
        if self.pending.is_none()
            && let Some(frame) = self.mailbox.take_ready()
        {
            if frame.acquire_fence().is_some() {
                self.fence_use.waited(CpuWait::Mailbox);
            }
            return self.submit(frame);
        }
        self.mailbox.check_time(self.fence_timeout())
    }

    /// In mailbox: waits for the next frame that is on its way or held, until it is on screen.
    pub(super) fn finish_newest(&mut self) -> Result<Option<Shown>> {
        if self.pending.is_none() {
            self.mailbox.wait(self.fence_timeout())?;
            self.advance()?;
        }
        if self.pending.is_none() {
            return Ok(None);
        }
        let shown = self.wait_pending()?;
        self.advance()?;
        Ok(Some(shown))
    }
}

fn busy(sent: &io::Result<()>) -> bool {
    sent.as_ref().is_err_and(|cause| cause.raw_os_error() == Some(libc::EBUSY))
}
