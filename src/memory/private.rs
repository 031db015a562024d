//! A private mapping of a buffer's memory, and how many of its pages the kernel has copied.

use std::io;
use std::os::fd::AsFd;

use nix::libc;
use nix::sys::mman::MmapAdvise;

use super::region::Region;
use super::{Memory, page_size};
use crate::error::{Context, Result};
use crate::uapi;

/// A copy-on-write mapping of one memory plane: the device's own pages, until they are written.
#[derive(Debug)]
pub(crate) struct Private {
    region: Region,
    pages: Pages,
}

/// How a private mapping's pages came there, which decides who can count those that were copied, and how to be rid of them.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Pages {
    /// By page faults from a memfd: they come again when dropped.
    Faulted,
    /// By the exporter's mmap, as pages that the kernel knows (`vm_insert_page`: vb2-vmalloc, vb2-dma-sg).
    Inserted,
    /// By the exporter's mmap, as bare frame numbers (`remap_pfn_range`: vb2-dma-contig). pagemap skips such mappings
    /// (`walk_page_test`).
    Bare,
}

impl Private {
    /// Maps `len` bytes of `memory`: of the memfd under a udmabuf, else of the dma-buf itself. `None` where the exporter only maps
    /// shared. All pages are in place, so that reading faults nowhere.
    ///
    /// # Errors
    /// What `mmap` says for want of memory or mappings.
    pub(crate) fn map(memory: &Memory, len: usize) -> Result<Option<Private>> {
        let memfd = match memory {
            Memory::DmaBuf(dma_buf) => dma_buf.memfd(),
            Memory::Plain(memfd) => Some(memfd.as_fd()),
        };
        let region = match Region::private(memfd.unwrap_or(memory.as_fd()), len) {
            Ok(region) => region,
            Err(error) if refused(&error) => return Ok(None),
            Err(error) => return Err(error).context("map", || format!("{len} bytes of a buffer privately")),
        };
        let pages = if memfd.is_some() {
            // SAFETY: this advice changes no content. Before Linux 5.14 it is unknown, and pages come one by one when read.
            let _ = unsafe { region.advise(0, usize::MAX, MmapAdvise::MADV_POPULATE_READ) };
            Pages::Faulted
        } else if known_to_pagemap(&region) {
            Pages::Inserted
        } else {
            Pages::Bare
        };
        Ok(Some(Private { region, pages }))
    }

    /// The addresses.
    pub(crate) fn region(&self) -> &Region {
        &self.region
    }

    /// How many pages were written, and so copied by the kernel, since it was mapped or renewed. Cost: two or three system calls,
    /// and for vb2-dma-contig one that looks at each page.
    ///
    /// # Errors
    /// What `/proc/self/pagemap` or `move_pages` says.
    pub(crate) fn copied(&self) -> Result<u64> {
        let mut count = 0;
        self.each_copied(&mut |_, pages| count += pages as u64)
            .context("count", || "the pages written in a private mapping")?;
        Ok(count)
    }

    /// How many pages were copied, and the mapping with the device's pages alone, if it can be had for less than mapping it anew.
    pub(crate) fn renew(self) -> (u64, Option<Private>) {
        let mut copied = 0;
        let mut renewed = self.pages == Pages::Faulted;
        let found = self.each_copied(&mut |first, pages| {
            copied += pages as u64;
            // SAFETY: a dropped page of a memfd's private mapping is the file's page again at the next access; the file cannot
            // shrink (`F_SEAL_SHRINK`). Other mappings are left alone.
            renewed = renewed && unsafe { self.region.advise(first, pages, MmapAdvise::MADV_DONTNEED) }.is_ok();
        });
        (copied, (found.is_ok() && renewed).then_some(self))
    }

    /// The same where it is known which pages were written: first page and number of pages of each run.
    pub(crate) fn renew_pages(self, mut written: impl Iterator<Item = (usize, usize)>) -> Option<Private> {
        let renewed = self.pages == Pages::Faulted
            // SAFETY: as in `renew`.
            && written.all(|(first, pages)| unsafe { self.region.advise(first, pages, MmapAdvise::MADV_DONTNEED) }.is_ok());
        renewed.then_some(self)
    }

    /// The addresses alone, whatever pages are there now.
    pub(crate) fn into_region(self) -> Region {
        self.region
    }

    /// Calls `found` with the first page and the number of pages of each run of copied pages.
    fn each_copied(&self, found: &mut dyn FnMut(usize, usize)) -> io::Result<()> {
        let (start, len) = (self.region.start().as_ptr().addr(), self.region.len());
        if self.pages == Pages::Bare {
            return uapi::pages_on_nodes(self.region.start().as_ptr(), len, page_size(), found);
        }
        match uapi::pagemap_scan(start, len, page_size(), found) {
            Err(error) if error.raw_os_error() == Some(libc::ENOTTY) => {
                uapi::pagemap_read(start, len, page_size(), found)
            }
            scanned => scanned,
        }
    }
}

/// Whether pagemap shows the pages of a mapping that an exporter's mmap has filled. Where pagemap cannot be read it is taken so.
fn known_to_pagemap(region: &Region) -> bool {
    region.read(0, &mut [0]);
    uapi::pagemap_first(region.start().as_ptr().addr(), page_size()).unwrap_or(true)
}

/// Whether an errno of mmap means that the exporter does not map privately, or not at all.
fn refused(error: &io::Error) -> bool {
    use libc::{EACCES, EINVAL, ENODEV, ENOSYS, ENOTTY, ENXIO, EOPNOTSUPP, EPERM};
    let refusals = [EINVAL, ENODEV, ENXIO, EACCES, EPERM, ENOTTY, ENOSYS, EOPNOTSUPP];
    error.raw_os_error().is_some_and(|errno| refusals.contains(&errno))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::{Access, Allocator, Mapping};

    const PAGES: usize = 40;

    type Scan = fn(usize, usize, usize, &mut dyn FnMut(usize, usize)) -> io::Result<()>;

    fn runs(private: &Private, by: Scan) -> Vec<usize> {
        let mut all = Vec::new();
        let start = private.region().start().as_ptr().addr();
        let scanned =
            by(start, private.region().len(), page_size(), &mut |first, pages| all.extend(first..first + pages));
        match scanned {
            Ok(()) => all,
            // A sandbox without it: nothing to test.
            Err(_) => Vec::new(),
        }
    }

    #[test]
    fn written_pages_are_counted_and_dropped() {
        let page = page_size();
        let memory = Allocator::Plain.allocate(PAGES * page).unwrap();
        let mut shared = Mapping::new(memory.as_fd(), PAGES * page, Access::ReadWrite).unwrap();
        shared.write(0, &vec![5; PAGES * page]);
        let private = Private::map(&memory, PAGES * page).unwrap().unwrap();
        private.region().read(0, &mut vec![0; PAGES * page]);
        let Ok(none) = private.copied() else { return };
        assert_eq!(none, 0);
        for number in [0, 3, 4, 39] {
            // SAFETY: nobody else knows the mapping.
            unsafe { private.region().write(number * page + 17, &[9]) };
        }
        assert_eq!(private.copied().unwrap(), 4);
        let read = runs(&private, uapi::pagemap_read);
        assert!(read == [0, 3, 4, 39] || read.is_empty(), "{read:?}");
        let scanned = runs(&private, uapi::pagemap_scan);
        assert!(scanned == [0, 3, 4, 39] || scanned.is_empty(), "{scanned:?}");
        let mut byte = [0];
        shared.read(17, &mut byte);
        assert_eq!(byte, [5], "the file changed");
        let (copied, renewed) = private.renew();
        let renewed = renewed.unwrap();
        assert_eq!(copied, 4);
        assert_eq!(renewed.copied().unwrap(), 0);
        renewed.region().read(17, &mut byte);
        assert_eq!(byte, [5]);
    }
}
