//! `SyncFile`: a file over fences.

use std::fmt::Write as _;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::libc;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::dmabuf::DmaBuf;
use crate::error::{Context, Error, Kind, Result};
use crate::memory::Access;
use crate::uapi::{self, RawFence};

/// Under which name the kernel lists fences that were merged here.
const MERGED: &[u8] = b"dmaflow";

/// The kernel's word for the driver of a fence that has signalled, since Linux 6.17 (`dma_fence_driver_name`).
const DETACHED: &str = "detached-driver";

/// A file over one or several fences of the kernel, which signal once and never again become active. Readable (`POLLIN`) when all
/// of them have signalled; closes on exec. See linux/sync_file.h and drivers/dma-buf/sync_file.c.
#[derive(Debug)]
pub struct SyncFile(OwnedFd);

/// Whether a fence has signalled.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum FenceState {
    /// Not yet.
    Active,
    /// Its work is done.
    Signalled,
    /// Its work has failed, with this errno; nobody needs to wait for it any more.
    Failed(i32),
}

impl FenceState {
    /// Of `sync_file_info.status` and `sync_fence_info.status`.
    fn of(status: i32) -> FenceState {
        match status {
            0 => FenceState::Active,
            1.. => FenceState::Signalled,
            error => FenceState::Failed(error.saturating_neg()),
        }
    }
}

/// What the kernel tells of one fence.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct FenceInfo {
    /// The driver that signals it. Since Linux 6.17 it is forgotten when it has signalled, and `detached-driver` stands here.
    pub driver: String,
    /// The driver's name of what signals one fence after the other: an engine, a queue.
    pub timeline: String,
    /// Whether it has signalled.
    pub state: FenceState,
    /// When it did, in ns of `CLOCK_MONOTONIC`.
    pub signalled_at_ns: Option<u64>,
}

impl SyncFile {
    /// The fences that are in a dma-buf now and that such an access has to wait for: [`Access::Read`] for those of writers,
    /// [`Access::ReadWrite`] for those of writers and readers. With none the sync file has signalled. Those that have signalled already are
    /// not among them, nor whether their work had failed (`dma_resv_iter_first`). Cost: one system call.
    ///
    /// `DMA_BUF_IOCTL_EXPORT_SYNC_FILE`, `DMA_BUF_SYNC_READ` and `DMA_BUF_SYNC_RW` (linux/dma-buf.h).
    ///
    /// # Errors
    /// [`Kind::Unsupported`] before Linux 6.0.
    pub fn export(dma_buf: &DmaBuf, access: Access) -> Result<SyncFile> {
        let exported = uapi::dma_buf_export_sync_file(dma_buf.as_fd(), access);
        exported
            .map(SyncFile)
            .context("take the fences of", || "a dma-buf")
            .map_err(|error| before_6_0(error).said_by("DMA_BUF_IOCTL_EXPORT_SYNC_FILE"))
    }

    /// Takes over what a C interface gives for a fence: a descriptor, or -1, which stands for one that has signalled
    /// (`vkGetSemaphoreFdKHR`, `vkGetFenceFdKHR`; also `OUT_FENCE_PTR`), and of which nothing needs to be waited for: `None`.
    ///
    /// # Safety
    /// A descriptor that is not negative must be open, and nobody else's to close ([`FromRawFd::from_raw_fd`]).
    pub unsafe fn from_raw(fd: RawFd) -> Option<SyncFile> {
        // SAFETY: the caller vouches for one that is not negative, and no other comes here.
        (fd >= 0).then(|| SyncFile(unsafe { OwnedFd::from_raw_fd(fd) }))
    }

    /// Adds these fences to a dma-buf: as a reader's ([`Access::Read`]), for which writers wait, or as a writer's
    /// ([`Access::ReadWrite`]), for which everybody waits who synchronises implicitly. Cost: one system call.
    ///
    /// # Errors
    /// [`Kind::Unsupported`] before Linux 6.0; otherwise what `DMA_BUF_IOCTL_IMPORT_SYNC_FILE` says.
    pub fn import_into(&self, dma_buf: &DmaBuf, access: Access) -> Result<()> {
        let imported = uapi::dma_buf_import_sync_file(dma_buf.as_fd(), self.as_fd(), access);
        imported
            .context("add a fence to", || "a dma-buf")
            .map_err(|error| before_6_0(error).said_by("DMA_BUF_IOCTL_IMPORT_SYNC_FILE"))
    }

    /// A sync file that signals when both have (`SYNC_IOC_MERGE`). Cost: one system call.
    ///
    /// The kernel takes over only what has not signalled yet (`__dma_fence_unwrap_merge`, dma-fence-unwrap.c): work that had failed before
    /// is forgotten. [`check`](SyncFile::check) both first where that matters.
    ///
    /// # Errors
    /// What the kernel says for want of descriptors or memory, or if one of both is no sync file.
    pub fn merge(&self, other: &SyncFile) -> Result<SyncFile> {
        let merged = uapi::sync_file_merge(self.as_fd(), other.as_fd(), MERGED);
        merged
            .map(SyncFile)
            .context("merge", || "two fences")
            .map_err(|error| error.said_by("SYNC_IOC_MERGE"))
    }

    /// The same fences in another descriptor. Cost: one system call.
    ///
    /// # Errors
    /// For want of descriptors.
    pub fn try_clone(&self) -> Result<SyncFile> {
        self.0.try_clone().map(SyncFile).context("duplicate", || "a fence")
    }

    /// Whether all of its fences have signalled, with success or with an error. Cost: one system call.
    pub fn is_signalled(&self) -> bool {
        // A poll without a wait fails for want of kernel memory alone; not signalled is the answer that does no harm.
        self.poll(PollTimeout::ZERO).unwrap_or(false)
    }

    /// How all of its fences are together. Cost: one system call.
    ///
    /// # Errors
    /// [`Kind::Unsupported`] if the descriptor that it was made of is no sync file.
    pub fn state(&self) -> Result<FenceState> {
        let status = uapi::sync_file_status(self.as_fd()).context("ask the state of", || "a fence");
        let (status, _) = status.map_err(|error| error.said_by("SYNC_IOC_FILE_INFO"))?;
        Ok(FenceState::of(status))
    }

    /// What the kernel tells of each of its fences. Cost: two system calls.
    ///
    /// # Errors
    /// As [`SyncFile::state`].
    pub fn fences(&self) -> Result<Vec<FenceInfo>> {
        let asked = || -> io::Result<Vec<RawFence>> {
            let (_, count) = uapi::sync_file_status(self.as_fd())?;
            let mut raw = vec![RawFence::default(); count as usize];
            let there = uapi::sync_file_fences(self.as_fd(), &mut raw)?;
            raw.truncate(there);
            Ok(raw)
        };
        let raw = asked().context("ask the names of", || "a fence");
        let raw = raw.map_err(|error| error.said_by("SYNC_IOC_FILE_INFO"))?;
        Ok(raw.iter().map(FenceInfo::of).collect())
    }

    /// Waits until all of its fences have signalled, `timeout` at most. Interrupted by a signal, it waits for what is left. Cost: one
    /// system call to wait, and one to learn whether their work has failed.
    ///
    /// # Errors
    /// [`Kind::Timeout`], naming the driver, the timeline and the time, if one has not signalled; [`Kind::System`] if the work of one
    /// has failed.
    pub fn wait(&self, timeout: Duration) -> Result<()> {
        let start = Instant::now();
        loop {
            let left = timeout.saturating_sub(start.elapsed());
            // Rounded up: the last millisecond is waited for as well.
            let step = match left.is_zero() {
                true => PollTimeout::ZERO,
                false => {
                    PollTimeout::try_from(left.saturating_add(Duration::from_millis(1))).unwrap_or(PollTimeout::MAX)
                }
            };
            if self.poll(step).context("wait for", || self.to_string())? {
                return self.succeeded();
            }
            if left.is_zero() {
                return Err(self.overdue(timeout));
            }
        }
    }

    /// Whether all of its fences have signalled, without waiting. Cost: one system call, and one more when they have.
    ///
    /// # Errors
    /// [`Kind::System`] if the work of one has failed.
    pub fn check(&self) -> Result<bool> {
        match self.is_signalled() {
            true => self.succeeded().map(|()| true),
            false => Ok(false),
        }
    }

    /// The error of a fence that has not signalled for so long.
    pub(crate) fn overdue(&self, waited: Duration) -> Error {
        let error = Error::new(Kind::Timeout, "wait for", self.to_string());
        let millis = u64::try_from(waited.as_millis()).unwrap_or(u64::MAX);
        error
            .because(format!("it has not signalled for {} s", Duration::from_millis(millis).as_secs_f64()))
            .repair("its device is stuck, or the work that it stands for was never begun")
            .of_fence()
    }

    fn succeeded(&self) -> Result<()> {
        match self.state()? {
            FenceState::Failed(errno) => {
                let error = Error::from_io("wait for", self.to_string(), io::Error::from_raw_os_error(errno));
                Err(error
                    .kind_is(Kind::System)
                    .repair("the work that it stands for has failed; the kernel log may say why")
                    .of_fence())
            }
            FenceState::Active | FenceState::Signalled => Ok(()),
        }
    }

    /// Whether it is readable within this time; `false` also when a signal came.
    fn poll(&self, timeout: PollTimeout) -> io::Result<bool> {
        let mut fds = [PollFd::new(self.as_fd(), PollFlags::POLLIN)];
        match poll(&mut fds, timeout) {
            Ok(count) => Ok(count > 0),
            Err(Errno::EINTR) => Ok(false),
            Err(errno) => Err(errno.into()),
        }
    }
}

fn before_6_0(error: Error) -> Error {
    match error.errno() {
        Some(libc::ENOTTY) => error.repair("the kernel is older than Linux 6.0, or the descriptor is no dma-buf"),
        _ => error,
    }
}

impl FenceInfo {
    fn of(raw: &RawFence) -> FenceInfo {
        let state = FenceState::of(raw.status);
        FenceInfo {
            driver: text(&raw.driver_name),
            timeline: text(&raw.obj_name),
            state,
            signalled_at_ns: (state != FenceState::Active).then_some(raw.timestamp_ns),
        }
    }
}

/// A name up to its first zero.
fn text(bytes: &[u8]) -> String {
    let end = bytes.iter().position(|&byte| byte == 0).unwrap_or(bytes.len());
    String::from_utf8_lossy(&bytes[..end]).into_owned()
}

/// `the fence of vgem (timeline unbound)`: of those that have not signalled or have failed; of all, if all is well with them.
impl std::fmt::Display for SyncFile {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let fences = self.fences().unwrap_or_default();
        let odd = |fence: &&FenceInfo| fence.state != FenceState::Signalled;
        let mut named: Vec<_> = fences.iter().filter(odd).collect();
        if named.is_empty() {
            named = fences.iter().collect();
        }
        let mut names = String::new();
        for fence in named {
            let comma = if names.is_empty() { "" } else { ", " };
            match fence.driver.as_str() {
                DETACHED => write!(names, "{comma}a driver that has let go of it")?,
                driver => write!(names, "{comma}{driver} (timeline {})", fence.timeline)?,
            }
        }
        match names.is_empty() {
            true => f.write_str("a fence"),
            false => write!(f, "the fence of {names}"),
        }
    }
}

/// Takes over a descriptor, for example of a `VkSemaphore` or a `VkFence` (`VK_EXTERNAL_SEMAPHORE_HANDLE_TYPE_SYNC_FD_BIT`). Nothing is
/// asked of the kernel: whether it is a sync file shows when it is used.
///
/// Vulkan may give -1 instead, which is no descriptor and means that the fence has signalled; [`SyncFile::from_raw`] takes either.
impl From<OwnedFd> for SyncFile {
    fn from(fd: OwnedFd) -> SyncFile {
        SyncFile(fd)
    }
}

impl From<SyncFile> for OwnedFd {
    fn from(file: SyncFile) -> OwnedFd {
        file.0
    }
}

impl AsFd for SyncFile {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::unistd::{pipe, write};

    /// A pipe is waited for as a fence is, and says so of neither's names.
    #[test]
    fn waiting_ends_in_time() {
        let (read, end) = pipe().unwrap();
        let file = SyncFile::from(read);
        assert!(!file.is_signalled() && !file.check().unwrap());
        let start = Instant::now();
        let error = file.wait(Duration::from_millis(30)).unwrap_err();
        assert!(start.elapsed() >= Duration::from_millis(30));
        assert_eq!(error.kind(), Kind::Timeout);
        assert!(error.line().contains("0.03 s"), "{error:?}");
        write(&end, b"x").unwrap();
        assert!(file.is_signalled());
        // Readable, and no sync file: no wait can vouch for it.
        assert_eq!(file.wait(Duration::ZERO).unwrap_err().kind(), Kind::Unsupported);
        assert_eq!(file.fences().unwrap_err().kind(), Kind::Unsupported);
    }

    /// What Vulkan gives for a fence that has signalled is no descriptor.
    #[test]
    fn an_absent_fence_is_none() {
        use std::os::fd::{AsRawFd, IntoRawFd};
        // SAFETY: -1 is no descriptor.
        assert!(unsafe { SyncFile::from_raw(-1) }.is_none());
        let fd = pipe().unwrap().0.into_raw_fd();
        // SAFETY: it is open, and `into_raw_fd` has made it nobody's.
        let file = unsafe { SyncFile::from_raw(fd) }.unwrap();
        assert_eq!(file.as_fd().as_raw_fd(), fd);
    }

    #[test]
    fn states_and_names_are_read() {
        assert_eq!(FenceState::of(0), FenceState::Active);
        assert_eq!(FenceState::of(1), FenceState::Signalled);
        assert_eq!(FenceState::of(-libc::EIO), FenceState::Failed(libc::EIO));
        assert_eq!(FenceState::of(i32::MIN), FenceState::Failed(i32::MAX));
        assert_eq!(text(b"vgem\0\0rest"), "vgem");
        assert_eq!(text(&[b'x'; 32]), "x".repeat(32));
    }

    /// Signals that interrupt the wait neither end it nor make it longer.
    #[test]
    fn an_interrupted_wait_goes_on() {
        use nix::sys::signal::{SigHandler, Signal, signal};
        extern "C" fn nothing(_: libc::c_int) {}
        // SAFETY: the handler does nothing at all.
        unsafe { signal(Signal::SIGUSR2, SigHandler::Handler(nothing)) }.unwrap();
        let (read, _end) = pipe().unwrap();
        let file = SyncFile::from(read);
        // SAFETY: it has no preconditions.
        let waiter = unsafe { libc::pthread_self() };
        let start = Instant::now();
        let interrupter = std::thread::spawn(move || {
            for _ in 0..20 {
                std::thread::sleep(Duration::from_millis(5));
                // SAFETY: the thread lives until it has joined this one.
                assert_eq!(unsafe { libc::pthread_kill(waiter, libc::SIGUSR2) }, 0);
            }
        });
        let error = file.wait(Duration::from_millis(150)).unwrap_err();
        let waited = start.elapsed();
        interrupter.join().unwrap();
        assert_eq!(error.kind(), Kind::Timeout);
        assert!(waited >= Duration::from_millis(150) && waited < Duration::from_secs(5), "{waited:?}");
    }
}
