//! Which descriptors of a buffer consumers get: such that they can map it for reading and not for writing, unless its owner wants otherwise.
//!
//! - Of a dma-buf: one that was exported for reading alone ([`DmaBuf::read_only`](crate::dmabuf::DmaBuf::read_only)).
//! - Of memory that is a memfd, or that a memfd lies under: the memfd, opened anew for reading. Whoever has it could open it for writing
//!   once more through `/proc`, so it is sealed first (`F_SEAL_FUTURE_WRITE`, Linux 5.1): what is mapped stays as it is mapped, and nobody
//!   maps it shared for writing or writes to it from then on, the server's own process neither (shmem_mmap, shmem_write_begin in
//!   mm/shmem.c).
//! - Others cannot be given so. Who has a descriptor for reading and writing has both.
//!
//! That holds for the CPU. A device to which a consumer gives a dma-buf that is for reading alone may write to it all the same: no importer
//! looks at the mode (`dma_buf_get` in drivers/dma-buf/dma-buf.c), so a V4L2 node captures into it and a GPU renders into it. Of a memfd
//! that cannot be done: no udmabuf is made of one that is sealed so (`SEALS_DENIED` in drivers/dma-buf/udmabuf.c).
//! Where consumers may write, only those get a descriptor for writing that ask for it, as far as the memory has both: a dma-buf that was also
//! exported for reading alone. A memfd that one may write to cannot be sealed for another.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use nix::fcntl::{FcntlArg, OFlag, SealFlag, fcntl, open};
use nix::sys::stat::{Mode, fstat};

use crate::dmabuf::is_read_only;
use crate::error::{Context, Error, Kind, Result};
use crate::frame::Buffer;
use crate::memory::Memory;

/// What consumers get of one memory plane.
#[derive(Debug)]
enum Given {
    /// The memory's own descriptor.
    Own,
    /// That of the dma-buf for reading alone.
    ReadOnly,
    /// The memfd, opened for reading.
    Memfd(OwnedFd),
}

/// What consumers get of one buffer.
#[derive(Debug)]
pub(super) struct Gift {
    buffer: Buffer,
    /// For those that read.
    given: Vec<Given>,
    identities: Identities,
}

/// The inodes of the first memory plane, by which both sides know it. To the kernel, the dma-buf for reading alone is another one.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
struct Identities {
    reading: u64,
    writing: u64,
}

impl Gift {
    /// # Errors
    /// [`Kind::Unsupported`] for memory that can only be given for writing too, unless that is `writable`; what the system says.
    pub(super) fn new(buffer: &Buffer, writable: bool) -> Result<Gift> {
        let given = buffer.memory().iter().map(|memory| match writable {
            true => for_either(memory),
            false => for_reading(memory, buffer),
        });
        let given = given.collect::<Result<_>>()?;
        let mut gift = Gift { given, buffer: buffer.clone(), identities: Identities::default() };
        let inode = |writable| {
            let first = gift.fds(writable).next().map(fstat).transpose();
            Ok::<_, Error>(first.context("identify", || "a buffer")?.map_or(0, |stat| stat.st_ino))
        };
        gift.identities = Identities { reading: inode(false)?, writing: inode(true)? };
        Ok(gift)
    }

    /// The buffer that it is of.
    pub(super) fn buffer(&self) -> &Buffer {
        &self.buffer
    }

    /// One descriptor for each memory plane, for a consumer that writes or for one that reads.
    pub(super) fn fds(&self, writable: bool) -> impl Iterator<Item = BorrowedFd<'_>> {
        self.buffer
            .memory()
            .iter()
            .zip(&self.given)
            .map(move |(memory, given)| match (given, memory) {
                _ if writable => memory.as_fd(),
                (Given::Memfd(memfd), _) => memfd.as_fd(),
                (Given::ReadOnly, Memory::DmaBuf(dma_buf)) => dma_buf.read_only().unwrap_or(dma_buf.as_fd()),
                _ => memory.as_fd(),
            })
    }

    /// What the first of [`fds`](Gift::fds) is known by.
    pub(super) fn identity(&self, writable: bool) -> u64 {
        if writable { self.identities.writing } else { self.identities.reading }
    }
}

/// The inode of a buffer's first memory plane.
///
/// # Errors
/// What `fstat` says.
pub(super) fn identity(buffer: &Buffer) -> Result<u64> {
    let Some(first) = buffer.memory().first() else { return Ok(0) };
    Ok(fstat(first).context("identify", || "a buffer")?.st_ino)
}

/// Where consumers may write: to those that read, what is for reading alone if there is such.
fn for_either(memory: &Memory) -> Result<Given> {
    if is_read_only(memory.as_fd()) {
        let error = Error::new(Kind::Permission, "share for writing", "a buffer");
        return Err(error
            .because("it came from somebody who shares it for reading alone")
            .repair("share it without --writable, or with it where it comes from"));
    }
    Ok(match memory {
        Memory::DmaBuf(dma_buf) if dma_buf.read_only().is_some() => Given::ReadOnly,
        _ => Given::Own,
    })
}

fn for_reading(memory: &Memory, buffer: &Buffer) -> Result<Given> {
    let memfd = match memory {
        Memory::DmaBuf(dma_buf) if dma_buf.read_only().is_some() => return Ok(Given::ReadOnly),
        Memory::DmaBuf(dma_buf) => dma_buf.memfd().ok_or_else(|| {
            let error = Error::new(Kind::Unsupported, "share for reading alone", "a dma-buf");
            error
                .because("it was exported for reading and writing, and whoever has it could do both")
                .repair(
                    "share it with --writable if consumers may do both, or let the camera capture into its own buffers",
                )
        })?,
        Memory::Plain(memfd) if is_read_only(memfd.as_fd()) => return Ok(Given::Own),
        Memory::Plain(memfd) => {
            // From here on nobody maps it for writing: the owner's mapping, which it fills it by, is made first.
            drop(buffer.write()?);
            memfd.as_fd()
        }
    };
    let about = || "a memfd for reading alone";
    fcntl(memfd, FcntlArg::F_ADD_SEALS(SealFlag::F_SEAL_FUTURE_WRITE)).context("share", about)?;
    let path = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&memfd));
    let opened = open(path.as_str(), OFlag::O_RDONLY | OFlag::O_CLOEXEC, Mode::empty());
    Ok(Given::Memfd(opened.context("share", about)?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::{Format, Layout};
    use crate::memory::{Access, Allocator, Mapping};
    use nix::errno::Errno;

    fn buffer() -> Buffer {
        let layout = Layout::packed(Format::parse("GREY").unwrap().0, (64, 64), 1).unwrap();
        Buffer::new(layout, vec![Allocator::Plain.allocate(4096).unwrap()], &[4096]).unwrap()
    }

    fn reopen(fd: BorrowedFd<'_>) -> OwnedFd {
        let path = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&fd));
        open(path.as_str(), OFlag::O_RDWR | OFlag::O_CLOEXEC, Mode::empty()).unwrap()
    }

    #[test]
    fn a_memfd_is_given_for_reading_and_its_owner_goes_on_to_write() {
        let buffer = buffer();
        let gift = Gift::new(&buffer, false).unwrap();
        let given = gift.fds(false).next().unwrap();
        assert!(is_read_only(given) && gift.identity(false) == identity(&buffer).unwrap());
        let refused = Mapping::new(given, 4096, Access::ReadWrite).unwrap_err();
        assert_eq!(refused.errno(), Some(nix::libc::EACCES));
        // Nor by another way.
        let again = reopen(given);
        let refused = Mapping::new(again.as_fd(), 4096, Access::ReadWrite).unwrap_err();
        assert_eq!(refused.errno(), Some(nix::libc::EPERM));
        assert_eq!(nix::unistd::write(&again, &[1]), Err(Errno::EPERM));
        buffer.write().unwrap().row(0, 0, &[7; 64]);
        let mut row = [0; 64];
        Mapping::new(given, 4096, Access::Read).unwrap().read(0, &mut row);
        assert_eq!(row, [7; 64]);
        // Others read it as the owner does, and write to private pages.
        let theirs = Buffer::new(*buffer.layout(), vec![Memory::Plain(given.try_clone_to_owned().unwrap())], &[4096]);
        let theirs = theirs.unwrap();
        assert!(theirs.maps_privately());
        let shared_on = Gift::new(&theirs, false).unwrap();
        assert!(is_read_only(shared_on.fds(false).next().unwrap()));
        assert_eq!(Gift::new(&theirs, true).unwrap_err().kind(), Kind::Permission);
    }

    #[test]
    fn what_may_be_written_is_given_as_it_is() {
        let buffer = buffer();
        let gift = Gift::new(&buffer, true).unwrap();
        let mut theirs = Mapping::new(gift.fds(true).next().unwrap(), 4096, Access::ReadWrite).unwrap();
        theirs.write(0, &[9]);
        let mut byte = [0];
        buffer.read().unwrap().row(0, 0, &mut byte);
        assert_eq!(byte, [9]);
    }

    /// Only who asks for it can write, where the memory has a descriptor for each.
    #[test]
    fn who_reads_gets_a_dma_buf_for_reading_also_where_others_write() {
        let file = |write: bool| -> OwnedFd {
            std::fs::OpenOptions::new()
                .read(true)
                .write(write)
                .open("/dev/zero")
                .unwrap()
                .into()
        };
        let dma_buf = crate::dmabuf::DmaBuf::new(file(true)).unwrap();
        let memory = Memory::DmaBuf(dma_buf.clone());
        assert!(matches!(for_either(&memory), Ok(Given::Own)));
        dma_buf.add_read_only(file(false));
        assert!(matches!(for_either(&memory), Ok(Given::ReadOnly)));
    }
}
