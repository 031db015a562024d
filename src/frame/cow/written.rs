//! Which pages of a plane the holder has written, so that the kernel need not be asked about each page at the end.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use crate::memory::Private;

/// A bit for each page, made with the first write.
#[derive(Debug)]
pub(super) struct Written {
    pages: usize,
    bits: OnceLock<Box<[AtomicU64]>>,
    /// The holder had a pointer for writing: only the kernel knows.
    unknown: AtomicBool,
}

impl Written {
    pub(super) fn new(pages: usize) -> Written {
        Written { pages, bits: OnceLock::new(), unknown: AtomicBool::new(false) }
    }

    /// Notes a write to the pages from `first` to `last`. Pages that the plane lacks are left out.
    pub(super) fn mark(&self, first: usize, last: usize) {
        let Some(end) = self.pages.checked_sub(1) else { return };
        let bits = self
            .bits
            .get_or_init(|| (0..self.pages.div_ceil(64)).map(|_| AtomicU64::new(0)).collect());
        for page in first..=last.min(end) {
            if let Some(word) = bits.get(page / 64) {
                word.fetch_or(1 << (page % 64), Ordering::Relaxed);
            }
        }
    }

    /// Notes that any page may be written from now on.
    pub(super) fn mark_unknown(&self) {
        self.unknown.store(true, Ordering::Relaxed);
    }

    /// How many pages of `device` the kernel has copied: by these notes, else as it says itself.
    pub(super) fn pages(&self, device: &Private) -> u64 {
        if self.unknown.load(Ordering::Relaxed) {
            return device.copied().unwrap_or(0);
        }
        self.runs().map(|(_, pages)| pages as u64).sum()
    }

    /// How many pages the kernel has copied, and the mapping with the device's pages alone, if it can be had for less than a new one.
    pub(super) fn renew(&self, device: Private) -> (u64, Option<Private>) {
        if self.unknown.load(Ordering::Relaxed) {
            return device.renew();
        }
        let pages = self.runs().map(|(_, pages)| pages as u64).sum();
        if pages == 0 {
            return (0, Some(device));
        }
        (pages, device.renew_pages(self.runs()))
    }

    /// First page and number of pages of each run of written pages.
    fn runs(&self) -> impl Iterator<Item = (usize, usize)> + '_ {
        let bits = self.bits.get();
        let is_written = move |page: usize| {
            let word = bits.and_then(|bits| bits.get(page / 64));
            word.is_some_and(|word| word.load(Ordering::Relaxed) & (1 << (page % 64)) != 0)
        };
        let mut page = 0;
        std::iter::from_fn(move || {
            let bits = bits?;
            while page < self.pages && !is_written(page) {
                // A whole word at a time where nothing is written.
                let empty = page.is_multiple_of(64) && bits.get(page / 64)?.load(Ordering::Relaxed) == 0;
                page += if empty { 64 } else { 1 };
            }
            page = page.min(self.pages);
            let first = page;
            while page < self.pages && is_written(page) {
                page += 1;
            }
            (page > first).then_some((first, page - first))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn runs_are_the_pages_marked(pages in 0usize..300, marks in prop::collection::vec((0usize..400, 0usize..90), 0..12)) {
            let written = Written::new(pages);
            let mut expected = std::collections::BTreeSet::new();
            for (first, more) in marks {
                written.mark(first, first + more);
                expected.extend((first..=first + more).filter(|&page| page < pages));
            }
            let runs: Vec<_> = written.runs().collect();
            let found: Vec<_> = runs.iter().flat_map(|&(first, pages)| first..first + pages).collect();
            prop_assert_eq!(found, expected.into_iter().collect::<Vec<_>>());
        }
    }

    #[test]
    fn hostile_ranges() {
        let written = Written::new(3);
        written.mark(usize::MAX, usize::MAX);
        written.mark(2, usize::MAX);
        assert_eq!(written.runs().collect::<Vec<_>>(), [(2, 1)]);
        Written::new(0).mark(0, usize::MAX);
    }
}
