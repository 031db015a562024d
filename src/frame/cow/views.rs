//! What one queue knows of the views of its frames: the table, spare memory for those that are detached, and an account of copies.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError, Weak};

use super::ViewInfo;
use super::shared::Shared;
use super::table::{Seen, Table};
use crate::ledger::Copies;
use crate::memory::Region;

/// What a queue does when views keep so many buffers that the camera would starve.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub enum ViewPolicy {
    /// Detaches the oldest view: one copy of the frame, in the ledger, and the buffer is free again. The holder's pointers and bytes
    /// stay.
    #[default]
    Detach,
    /// Waits for a holder to let go; the error of the watchdog says who holds what.
    Wait,
    /// Fails at once, saying who holds what.
    Error,
}

/// Why bytes of a view were copied.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Cause {
    /// The holder wrote to a page, and the kernel copied it.
    Written,
    /// The view was detached.
    Detached,
    /// The exporter does not map privately.
    Snapshot,
}

impl Cause {
    const ALL: [Cause; 3] = [Cause::Written, Cause::Detached, Cause::Snapshot];

    fn text(self) -> &'static str {
        match self {
            Cause::Written => "pages written in a view",
            Cause::Detached => "view detached",
            Cause::Snapshot => "snapshot, because the exporter does not map privately",
        }
    }
}

/// A running account of copies.
#[derive(Debug, Default)]
pub(super) struct Account([(AtomicU64, AtomicU64); Cause::ALL.len()]);

impl Account {
    pub(super) fn enter(&self, cause: Cause, count: u64, bytes: u64) {
        let (counts, sums) = &self.0[cause as usize];
        counts.fetch_add(count, Ordering::Relaxed);
        sums.fetch_add(bytes, Ordering::Relaxed);
    }

    /// One entry for each cause that there was.
    pub(super) fn copies(&self) -> Vec<Copies> {
        let entries = Cause::ALL.into_iter().zip(&self.0).map(|(cause, (count, bytes))| {
            let (count, bytes) = (count.load(Ordering::Relaxed), bytes.load(Ordering::Relaxed));
            Copies { cause: cause.text(), count, bytes }
        });
        entries.filter(|entry| entry.count > 0).collect()
    }
}

/// Spare memory that is kept, at most.
const SPARES: usize = 4;

/// See the [module](self).
pub(crate) struct Views {
    pub(super) table: Table<Weak<Shared>>,
    pub(super) account: Account,
    spares: Mutex<Vec<Region>>,
}

impl Views {
    pub(crate) fn new() -> Views {
        Views { table: Table::new(), account: Account::default(), spares: Mutex::new(Vec::new()) }
    }

    /// Whether no frame has a view: one load.
    pub(crate) fn is_empty(&self) -> bool {
        self.table.is_empty()
    }

    /// A bit for each slot whose frame has a view.
    pub(crate) fn slots(&self) -> u64 {
        self.table
            .all()
            .fold(0, |bits, seen| bits | 1_u64.checked_shl(seen.slot).unwrap_or(0))
    }

    /// Who has views, oldest first.
    pub(crate) fn infos(&self) -> Vec<ViewInfo> {
        let mut infos: Vec<_> = self.table.all().map(|seen| seen.info()).collect();
        infos.sort_by_key(|info| info.since_us);
        infos
    }

    /// What was copied for views so far.
    pub(crate) fn copies(&self) -> Vec<Copies> {
        self.account.copies()
    }

    /// Detaches the views of one slot that nothing but views keeps, as `only_views` tells of a slot and its number of views: that
    /// with the oldest view first, and the next if a holder is writing to that one now. Whether a slot is free now.
    pub(crate) fn detach_oldest(&self, only_views: impl Fn(u32, u32) -> bool) -> bool {
        // By age; at most as many as the table has places, so this sorts a small array and allocates once.
        let mut views: Vec<Seen> = self.table.all().collect();
        views.sort_by_key(|seen| seen.since_us);
        let mut tried = 0_u64;
        for seen in &views {
            let bit = 1_u64.checked_shl(seen.slot).unwrap_or(0);
            let of_slot = || views.iter().filter(|view| view.slot == seen.slot);
            let count = of_slot().count() as u32;
            if tried & bit != 0 || !only_views(seen.slot, count) {
                continue;
            }
            tried |= bit;
            let detached = |view: &Seen| {
                let shared = self.table.view(view.place, view.slot).and_then(|weak| weak.upgrade());
                // One that is just being opened or dropped cannot be reached; it is tried the next time.
                shared.is_some_and(|shared| shared.try_detach())
            };
            if of_slot().all(detached) {
                return true;
            }
        }
        false
    }

    /// Memory of `len` bytes with all pages in place: a spare of that length, else new.
    pub(super) fn spare(&self, len: usize) -> std::io::Result<Region> {
        let mut spares = self.spares.lock().unwrap_or_else(PoisonError::into_inner);
        let found = spares.iter().position(|spare| spare.len() == len);
        let spare = found.map(|index| spares.swap_remove(index));
        drop(spares);
        spare.map_or_else(|| Region::anonymous(len), Ok)
    }

    /// Keeps memory for the next view that is detached.
    pub(super) fn keep(&self, spare: Region) {
        let mut spares = self.spares.lock().unwrap_or_else(PoisonError::into_inner);
        if spares.len() >= SPARES {
            // The oldest one: its length may be that of a format that is past.
            drop(spares.remove(0));
        }
        spares.push(spare);
    }
}
