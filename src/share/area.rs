//! The ring's memory: a sealed memfd that two processes map.
//!
//! The side that makes it seals its size (`F_SEAL_SHRINK`, `F_SEAL_GROW`, and `F_SEAL_SEAL` so that no other seal follows). The side that
//! gets it looks at both before it maps anything: memory that the other side could cut off would end this process with `SIGBUS` at the
//! next access (mmap(2)).

use std::io;
use std::num::NonZeroUsize;
use std::ops::Deref;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::Arc;

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::mman::{MapFlags, ProtFlags, mmap, munmap};
use nix::sys::stat::fstat;
use nix::unistd::ftruncate;

use super::ring::Area;
use crate::memory::page_size;

/// Those that the memory of a ring has.
const SEALS: SealFlag = SealFlag::F_SEAL_SHRINK
    .union(SealFlag::F_SEAL_GROW)
    .union(SealFlag::F_SEAL_SEAL);

/// An [`Area`] in memory that another process has as well. Clones share the mapping, which goes with the last of them.
#[derive(Clone, Debug)]
pub(super) struct SharedArea(Arc<Mapped>);

/// Unmapped on drop.
#[derive(Debug)]
struct Mapped {
    start: NonNull<Area>,
    len: NonZeroUsize,
}

// SAFETY: the mapping belongs to no thread; it may be used and unmapped from any.
unsafe impl Send for Mapped {}
// SAFETY: all that can be reached through a shared reference is an `Area`, whose fields are atomic words.
unsafe impl Sync for Mapped {}

impl SharedArea {
    /// A new ring, empty, and the descriptor to give to the other side.
    ///
    /// # Errors
    /// What `memfd_create`, `ftruncate`, `fcntl` and `mmap` say: no memory, no descriptor left.
    pub(super) fn create() -> io::Result<(SharedArea, OwnedFd)> {
        let len = len()?;
        let memfd = memfd_create("dmaflow-ring", MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING)?;
        ftruncate(&memfd, i64::try_from(len.get()).map_err(|_| Errno::EOVERFLOW)?)?;
        fcntl(&memfd, FcntlArg::F_ADD_SEALS(SEALS))?;
        Ok((SharedArea::map(memfd.as_fd(), len)?, memfd))
    }

    /// The ring that another process has made.
    ///
    /// # Errors
    /// `EPERM` for memory that is not sealed as documented, `EINVAL` for what is no such memory or has another size; what `mmap` says.
    pub(super) fn open(fd: BorrowedFd<'_>) -> io::Result<SharedArea> {
        // EINVAL of what has no seals (memfd_fcntl in mm/memfd.c).
        let seals = SealFlag::from_bits_truncate(fcntl(fd, FcntlArg::F_GET_SEALS)?);
        if !seals.contains(SEALS) {
            return Err(Errno::EPERM.into());
        }
        let len = len()?;
        // Not before the seals: until they are there, it changes.
        if usize::try_from(fstat(fd)?.st_size) != Ok(len.get()) {
            return Err(Errno::EINVAL.into());
        }
        SharedArea::map(fd, len)
    }

    /// Whether both are the same mapping.
    pub(super) fn is(&self, other: &SharedArea) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }

    fn map(fd: BorrowedFd<'_>, len: NonZeroUsize) -> io::Result<SharedArea> {
        let protection = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        // With all pages in place, so that no frame waits for one.
        let flags = MapFlags::MAP_SHARED | MapFlags::MAP_POPULATE;
        // SAFETY: a new mapping at an address that the kernel chooses takes nothing away from anybody.
        let start = unsafe { mmap(None, len, protection, flags, fd, 0) }?;
        Ok(SharedArea(Arc::new(Mapped { start: start.cast(), len })))
    }
}

/// The size of the area in whole pages.
fn len() -> io::Result<NonZeroUsize> {
    let len = size_of::<Area>().next_multiple_of(page_size());
    Ok(NonZeroUsize::new(len).ok_or(Errno::EINVAL)?)
}

impl Deref for SharedArea {
    type Target = Area;

    fn deref(&self) -> &Area {
        // SAFETY: mapped readable and writable for the life of `self`, at least as long as an `Area` (`len`), at the start of a page and so
        // aligned. Its size is sealed, so no page of it can be cut off. An `Area` is atomic words alone, of which every value is one, and
        // which others may change at any time, processes too: they use the same atomic instructions.
        unsafe { self.0.start.as_ref() }
    }
}

impl Drop for Mapped {
    fn drop(&mut self) {
        // SAFETY: start and length are those of the mapping made in `map`; references into it have ended with the borrow of `self`.
        let _ = unsafe { munmap(self.start.cast(), self.len.get()) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::share::ring::{Consumer, Server, WORDS};

    #[test]
    fn two_mappings_are_one_ring() {
        let (area, fd) = SharedArea::create().unwrap();
        let (mut server, mut consumer) = (Server::new(area, 2), Consumer::new(SharedArea::open(fd.as_fd()).unwrap()));
        drop(fd);
        server.publish(|_| [5; WORDS], ()).unwrap();
        let taken = consumer.take().unwrap();
        assert_eq!((taken.words, server.has_taken(|()| true)), ([5; WORDS], true));
        consumer.release(taken.position).unwrap();
        assert_eq!(server.collect(), Ok(0));
    }

    /// Memory that the other side could cut off is not mapped.
    #[test]
    fn what_is_not_sealed_is_refused() {
        let made = |seals, len| {
            let memfd = memfd_create("test", MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING).unwrap();
            ftruncate(&memfd, len).unwrap();
            fcntl(&memfd, FcntlArg::F_ADD_SEALS(seals)).unwrap();
            SharedArea::open(memfd.as_fd()).map(drop).map_err(|error| error.raw_os_error())
        };
        let whole = len().unwrap().get() as i64;
        assert_eq!(made(SEALS, whole), Ok(()));
        for missing in [SealFlag::F_SEAL_SHRINK, SealFlag::F_SEAL_GROW, SealFlag::F_SEAL_SEAL] {
            assert_eq!(made(SEALS - missing, whole), Err(Some(nix::libc::EPERM)), "{missing:?}");
        }
        for len in [0, whole - 1, whole + 1, 4 * whole] {
            assert_eq!(made(SEALS, len), Err(Some(nix::libc::EINVAL)), "{len}");
        }
        // It cannot be written.
        assert_eq!(made(SEALS | SealFlag::F_SEAL_WRITE, whole), Err(Some(nix::libc::EPERM)));
        let (pipe, _end) = nix::unistd::pipe().unwrap();
        assert_eq!(SharedArea::open(pipe.as_fd()).unwrap_err().raw_os_error(), Some(nix::libc::EINVAL));
        let file = std::fs::File::open("/proc/self/exe").unwrap();
        assert!(SharedArea::open(file.as_fd()).is_err());
    }
}
