//! An owned range of addresses, whose pages can be exchanged for others while its address stays.

use std::io;
use std::num::NonZeroUsize;
use std::os::fd::BorrowedFd;
use std::ptr::NonNull;

use nix::sys::mman::{MRemapFlags, MapFlags, MmapAdvise, ProtFlags, madvise, mmap, mmap_anonymous, mremap, munmap};

use super::{Span, page_size};

/// Whole pages that this process maps privately, readable and writable. Unmapped on drop.
#[derive(Debug)]
pub(crate) struct Region {
    start: NonNull<u8>,
    len: NonZeroUsize,
}

// SAFETY: a range of addresses belongs to no thread; it may be used and unmapped from any.
unsafe impl Send for Region {}
// SAFETY: through a shared reference bytes are only read, by raw copies that make no reference to them; `write` is unsafe and leaves
// the order of accesses to its caller.
unsafe impl Sync for Region {}

const READ_WRITE: ProtFlags = ProtFlags::PROT_READ.union(ProtFlags::PROT_WRITE);

impl Region {
    /// Maps the first `len` bytes of a file privately (`MAP_PRIVATE`): pages are the file's until they are written.
    ///
    /// # Errors
    /// The errno of `mmap`: `EINVAL` from exporters that only map shared.
    pub(crate) fn private(fd: BorrowedFd<'_>, len: usize) -> io::Result<Region> {
        let len = pages(len)?;
        // SAFETY: a new mapping at an address that the kernel chooses takes nothing away from anybody; its bytes are only ever copied,
        // so that a device that changes them breaks no reference.
        let start = unsafe { mmap(None, len, READ_WRITE, MapFlags::MAP_PRIVATE, fd, 0) }?;
        Ok(Region { start: start.cast(), len }.not_for_children())
    }

    /// New memory of at least `len` bytes with every page in place, so that writing it faults nowhere.
    ///
    /// # Errors
    /// The errno of `mmap`.
    pub(crate) fn anonymous(len: usize) -> io::Result<Region> {
        let len = pages(len)?;
        let flags = MapFlags::MAP_PRIVATE | MapFlags::MAP_POPULATE;
        // SAFETY: as above; anonymous memory has no other user.
        let start = unsafe { mmap_anonymous(None, len, READ_WRITE, flags) }?;
        Ok(Region { start: start.cast(), len }.not_for_children())
    }

    /// A child that inherited the pages would share them, and the next write here would copy them once more.
    fn not_for_children(self) -> Region {
        // SAFETY: the range is this region's own, and the advice changes nothing for this process. Without it all works as well.
        let _ = unsafe { madvise(self.start.cast(), self.len.get(), MmapAdvise::MADV_DONTFORK) };
        self
    }

    /// Length in bytes, whole pages.
    pub(crate) fn len(&self) -> usize {
        self.len.get()
    }

    /// The first byte's address.
    pub(crate) fn start(&self) -> NonNull<u8> {
        self.start
    }

    /// Its bytes, to read by copying them out.
    pub(crate) fn span(&self) -> Span<'_> {
        // SAFETY: the range is mapped readable for the life of `self`, whichever pages are there, and nothing makes a reference to it.
        unsafe { Span::new(self.start, self.len()) }
    }

    /// Copies bytes out, from `offset` on. Bytes past the end are zero in `out`.
    #[inline]
    pub(crate) fn read(&self, offset: usize, out: &mut [u8]) {
        let there = self.len().saturating_sub(offset).min(out.len());
        let (inside, outside) = out.split_at_mut(there);
        if there > 0 {
            // SAFETY: `offset + there` is at most the region's length, which is mapped readable for the life of `self`, whichever pages
            // are there; `inside` is the caller's own memory and cannot overlap a range that the kernel placed.
            unsafe {
                self.start
                    .add(offset)
                    .copy_to_nonoverlapping(NonNull::from(&mut *inside).cast(), there)
            };
        }
        // A call of nothing is not nothing for a row.
        if !outside.is_empty() {
            outside.fill(0);
        }
    }

    /// Copies bytes in, from `offset` on, and returns how many fitted.
    ///
    /// # Safety
    /// No other thread of this process reads or writes these bytes meanwhile.
    pub(crate) unsafe fn write(&self, offset: usize, bytes: &[u8]) -> usize {
        let fits = self.len().saturating_sub(offset).min(bytes.len());
        if fits > 0 {
            // SAFETY: `offset + fits` is at most the region's length, mapped writable for the life of `self`; `bytes` cannot overlap it;
            // nobody else uses the bytes, as the caller has promised.
            unsafe {
                self.start
                    .add(offset)
                    .copy_from_nonoverlapping(NonNull::from(bytes).cast(), fits)
            };
        }
        fits
    }

    /// All bytes. Only for memory that no file and no device has a part in.
    pub(crate) fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: the region is mapped readable and writable for its life and borrowed exclusively; new pages are zero, so all bytes are
        // initialised. Callers have it from `anonymous`.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr(), self.len.get()) }
    }

    /// Copies all of `other`, as far as there is room. One `memcpy`.
    pub(crate) fn copy_from(&mut self, other: &Region) {
        let len = self.len().min(other.len());
        // SAFETY: both ranges are mapped for the lives of their regions and at least `len` long; two regions never overlap, and this one
        // is borrowed exclusively.
        unsafe { self.start.copy_from_nonoverlapping(other.start, len) };
    }

    /// Puts these pages at the address of `target`, in the place of what is there, in one step: another thread that uses the
    /// address sees the old pages or the new ones. `self`'s own address is free then.
    ///
    /// # Errors
    /// The errno of `mremap`, and this region unchanged; `EINVAL` if the lengths differ.
    pub(crate) fn replace(self, target: &Region) -> Result<(), (Region, io::Error)> {
        if self.len != target.len {
            return Err((self, io::Error::from_raw_os_error(nix::libc::EINVAL)));
        }
        let flags = MRemapFlags::MREMAP_MAYMOVE | MRemapFlags::MREMAP_FIXED;
        // SAFETY: source and target are whole ranges of the same length that these two regions own, so nobody else's mapping is
        // touched; no reference into either exists. The kernel unmaps the target and moves the source under one lock
        // (mmap_lock for writing), for which a page fault of another thread waits.
        let moved =
            unsafe { mremap(self.start.cast(), self.len.get(), self.len.get(), flags, Some(target.start.cast())) };
        match moved {
            Ok(_) => {
                // The range was moved away: there is nothing to unmap.
                std::mem::forget(self);
                Ok(())
            }
            Err(errno) => Err((self, errno.into())),
        }
    }

    /// Advice on `pages` pages from page `first` on; clipped to the region.
    ///
    /// # Errors
    /// The errno of `madvise`.
    ///
    /// # Safety
    /// The advice must leave every page of the region accessible.
    pub(crate) unsafe fn advise(&self, first: usize, pages: usize, advice: MmapAdvise) -> io::Result<()> {
        let page = page_size();
        let start = first.saturating_mul(page).min(self.len());
        let len = pages.saturating_mul(page).min(self.len() - start);
        if len == 0 {
            return Ok(());
        }
        // SAFETY: the range lies inside the region; what the advice does to it is the caller's promise.
        unsafe { madvise(self.start.add(start).cast(), len, advice) }?;
        Ok(())
    }
}

impl Drop for Region {
    fn drop(&mut self) {
        // SAFETY: the range is this region's own, and no reference into it exists. The call can only fail for want of memory to split a
        // mapping, and then the range leaks.
        let _ = unsafe { munmap(self.start.cast(), self.len.get()) };
    }
}

/// A length in whole pages; `EINVAL` for none, `EOVERFLOW` for more than can be addressed.
fn pages(len: usize) -> io::Result<NonZeroUsize> {
    let whole = len
        .checked_next_multiple_of(page_size())
        .filter(|&len| isize::try_from(len).is_ok());
    let whole = whole.ok_or_else(|| io::Error::from_raw_os_error(nix::libc::EOVERFLOW))?;
    NonZeroUsize::new(whole).ok_or_else(|| io::Error::from_raw_os_error(nix::libc::EINVAL))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn filled(len: usize, byte: u8) -> Region {
        let region = Region::anonymous(len).unwrap();
        // SAFETY: nobody else knows the region.
        assert_eq!(unsafe { region.write(0, &vec![byte; len]) }, len);
        region
    }

    #[test]
    fn pages_change_under_an_address() {
        let page = page_size();
        let (target, spare) = (filled(3 * page, 1), filled(3 * page, 2));
        let address = target.start();
        spare.replace(&target).unwrap();
        let mut byte = [0];
        target.read(3 * page - 1, &mut byte);
        assert_eq!((byte, target.start()), ([2], address));
        let (kept, _) = filled(page, 3).replace(&target).unwrap_err();
        kept.read(0, &mut byte);
        assert_eq!(byte, [3]);
    }

    #[test]
    fn hostile_offsets_and_lengths() {
        let region = filled(page_size(), 7);
        let mut out = [9; 4];
        for offset in [page_size() - 1, page_size(), usize::MAX - 1, usize::MAX] {
            region.read(offset, &mut out);
            assert_eq!(out[1..], [0; 3]);
            // SAFETY: nobody else knows the region.
            assert!(unsafe { region.write(offset, &[1, 2, 3, 4]) } <= 1);
            // SAFETY: this advice changes no content.
            assert!(unsafe { region.advise(offset, offset, MmapAdvise::MADV_WILLNEED) }.is_ok());
        }
        for len in [0, usize::MAX, isize::MAX as usize] {
            assert!(Region::anonymous(len).is_err(), "{len}");
        }
    }
}
