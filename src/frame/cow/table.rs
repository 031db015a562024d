//! Who has views of which slots, and since when: entered before a view exists, removed after it is gone.
//!
//! Looking is free of locks and system calls: a bit for each place that is taken, and entries of atomic words with a version each, which
//! is odd while the entry holds. Whoever reads an entry reads its version before and after (a sequence lock).

use std::fmt;

#[cfg(loom)]
use loom::sync::{Mutex, atomic};
#[cfg(not(loom))]
use std::sync::{Mutex, atomic};

use atomic::{AtomicU32, AtomicU64, Ordering, fence};

/// The most views that the frames of one queue can have at a time: a bit each.
pub const MAX_VIEWS: usize = 64;

/// loom follows each atomic word; its models have two views at most.
const PLACES: usize = if cfg!(loom) { 2 } else { MAX_VIEWS };

/// Bytes of a holder's name that are kept.
const NAME_WORDS: usize = if cfg!(loom) { 1 } else { 4 };
const NAME_BYTES: usize = NAME_WORDS * 8;

/// Who has a view of which slot, and since when.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ViewInfo {
    /// The slot whose buffer it is of.
    pub slot: u32,
    /// What the holder calls itself, its first 32 bytes.
    pub holder: String,
    /// The holder's process.
    pub process: u32,
    /// The holder's thread, as the kernel numbers it.
    pub thread: u32,
    /// When it was opened, in µs of `CLOCK_MONOTONIC`.
    pub since_us: u64,
}

impl fmt::Display for ViewInfo {
    /// `slot 2 by detector (process 12, thread 13) for 1.3 s`
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ViewInfo { slot, holder, process, thread, since_us } = self;
        let seconds = crate::clock::now_us().saturating_sub(*since_us) as f64 / 1e6;
        write!(f, "slot {slot} by {holder} (process {process}, thread {thread}) for {seconds:.1} s")
    }
}

/// One entry as it was at one moment, without an allocation.
#[derive(Clone, Copy, Debug)]
pub(super) struct Seen {
    /// Which place it has in the table.
    pub(super) place: usize,
    pub(super) slot: u32,
    pub(super) since_us: u64,
    process: u32,
    thread: u32,
    name: [u64; NAME_WORDS],
}

impl Seen {
    pub(super) fn info(&self) -> ViewInfo {
        let bytes: Vec<u8> = self.name.iter().flat_map(|word| word.to_ne_bytes()).collect();
        let end = bytes.iter().position(|&byte| byte == 0).unwrap_or(bytes.len());
        ViewInfo {
            slot: self.slot,
            holder: String::from_utf8_lossy(&bytes[..end]).trim_end_matches('\u{fffd}').to_owned(),
            process: self.process,
            thread: self.thread,
            since_us: self.since_us,
        }
    }
}

/// What a holder says of itself.
#[derive(Clone, Copy, Debug)]
pub(super) struct Holder<'a> {
    pub(super) name: &'a str,
    pub(super) process: u32,
    pub(super) thread: u32,
    pub(super) since_us: u64,
}

/// The table. `T` is how a view is reached to be detached; it is asked for by place, under a lock that only detaching and the view's own
/// beginning and end take.
pub(crate) struct Table<T> {
    /// Places that are taken.
    taken: AtomicU64,
    entries: Box<[Entry<T>]>,
}

struct Entry<T> {
    version: AtomicU32,
    slot: AtomicU32,
    process: AtomicU32,
    thread: AtomicU32,
    since_us: AtomicU64,
    name: [AtomicU64; NAME_WORDS],
    view: Mutex<Option<T>>,
}

impl<T> Entry<T> {
    fn new() -> Entry<T> {
        Entry {
            version: AtomicU32::new(0),
            slot: AtomicU32::new(0),
            process: AtomicU32::new(0),
            thread: AtomicU32::new(0),
            since_us: AtomicU64::new(0),
            name: std::array::from_fn(|_| AtomicU64::new(0)),
            view: Mutex::new(None),
        }
    }

    fn with_view<R>(&self, with: impl FnOnce(&mut Option<T>) -> R) -> R {
        // A panic while it was held leaves a whole value: nothing in here can panic half-way.
        let mut view = self.view.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        with(&mut view)
    }
}

impl<T> Table<T> {
    pub(crate) fn new() -> Table<T> {
        Table { taken: AtomicU64::new(0), entries: (0..PLACES).map(|_| Entry::new()).collect() }
    }

    /// Whether no view is entered: one load.
    pub(crate) fn is_empty(&self) -> bool {
        self.taken.load(Ordering::Acquire) == 0
    }

    /// Enters a view that is about to be made, and gives its place; `None` if all are taken.
    pub(super) fn enter(&self, slot: u32, holder: Holder<'_>) -> Option<usize> {
        let place = self.take()?;
        let entry = self.entries.get(place)?;
        // Before the words below: who sees one of them sees the even version that the last holder has left.
        fence(Ordering::Release);
        entry.slot.store(slot, Ordering::Relaxed);
        entry.process.store(holder.process, Ordering::Relaxed);
        entry.thread.store(holder.thread, Ordering::Relaxed);
        entry.since_us.store(holder.since_us, Ordering::Relaxed);
        let mut bytes = [0; NAME_BYTES];
        let len = holder.name.len().min(NAME_BYTES);
        bytes[..len].copy_from_slice(&holder.name.as_bytes()[..len]);
        for (word, bytes) in entry.name.iter().zip(bytes.as_chunks::<8>().0) {
            word.store(u64::from_ne_bytes(*bytes), Ordering::Relaxed);
        }
        let version = entry.version.load(Ordering::Relaxed);
        entry.version.store(version.wrapping_add(1), Ordering::Release);
        Some(place)
    }

    fn take(&self) -> Option<usize> {
        let mut taken = self.taken.load(Ordering::Relaxed);
        loop {
            let place = (!taken).trailing_zeros() as usize;
            if place >= PLACES {
                return None;
            }
            let with = taken | 1 << place;
            // Acquire: what the last holder of the place did with it comes before.
            match self.taken.compare_exchange(taken, with, Ordering::AcqRel, Ordering::Relaxed) {
                Ok(_) => return Some(place),
                Err(now) => taken = now,
            }
        }
    }

    /// Makes an entered view reachable.
    pub(super) fn reach(&self, place: usize, view: T) {
        if let Some(entry) = self.entries.get(place) {
            entry.with_view(|reach| *reach = Some(view));
        }
    }

    /// Removes the view at `place`, which is gone: the holder that entered it, once.
    pub(super) fn remove(&self, place: usize) {
        let Some(entry) = self.entries.get(place) else { return };
        let last = entry.with_view(Option::take);
        let version = entry.version.load(Ordering::Relaxed);
        entry.version.store(version.wrapping_add(1), Ordering::Release);
        self.taken.fetch_and(!(1 << place), Ordering::Release);
        drop(last);
    }

    /// What is entered at `place`, if anything is.
    fn see(&self, place: usize) -> Option<Seen> {
        let entry = self.entries.get(place)?;
        let before = entry.version.load(Ordering::Acquire);
        if before.is_multiple_of(2) {
            return None;
        }
        let mut name = [0; NAME_WORDS];
        for (word, stored) in name.iter_mut().zip(&entry.name) {
            *word = stored.load(Ordering::Relaxed);
        }
        let seen = Seen {
            place,
            slot: entry.slot.load(Ordering::Relaxed),
            since_us: entry.since_us.load(Ordering::Relaxed),
            process: entry.process.load(Ordering::Relaxed),
            thread: entry.thread.load(Ordering::Relaxed),
            name,
        };
        fence(Ordering::Acquire);
        (entry.version.load(Ordering::Relaxed) == before).then_some(seen)
    }

    /// Every view that is entered now. No lock, no system call, no allocation.
    pub(super) fn all(&self) -> impl Iterator<Item = Seen> + '_ {
        let mut taken = self.taken.load(Ordering::Acquire);
        std::iter::from_fn(move || {
            while taken != 0 {
                let place = taken.trailing_zeros() as usize;
                taken &= taken - 1;
                if let Some(seen) = self.see(place) {
                    return Some(seen);
                }
            }
            None
        })
    }
}

impl<T: Clone> Table<T> {
    /// How to reach the view at `place`, if it still is of slot `slot`. Takes the entry's lock.
    pub(super) fn view(&self, place: usize, slot: u32) -> Option<T> {
        let entry = self.entries.get(place)?;
        let view = entry.with_view(|view| view.clone());
        view.filter(|_| self.see(place).is_some_and(|seen| seen.slot == slot))
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    fn holder(name: &str, since_us: u64) -> Holder<'_> {
        Holder { name, process: 7, thread: 8, since_us }
    }

    #[test]
    fn what_is_entered_is_seen_until_it_is_removed() {
        let table: Table<u32> = Table::new();
        assert!(table.is_empty());
        let first = table.enter(3, holder("detector", 10)).unwrap();
        let second = table.enter(3, holder(&"ä".repeat(40), 20)).unwrap();
        table.reach(second, 42);
        let infos: Vec<_> = table.all().map(|seen| seen.info()).collect();
        assert_eq!(infos[0].holder, "detector");
        assert_eq!((infos[0].slot, infos[0].process, infos[0].thread, infos[0].since_us), (3, 7, 8, 10));
        assert_eq!(infos[1].holder, "ä".repeat(16));
        assert_eq!((table.view(second, 3), table.view(second, 4), table.view(first, 3)), (Some(42), None, None));
        table.remove(first);
        assert_eq!(table.all().map(|seen| seen.since_us).collect::<Vec<_>>(), [20]);
        table.remove(second);
        assert!(table.is_empty() && table.view(second, 3).is_none());
    }

    #[test]
    fn a_full_table_says_so() {
        let table: Table<u32> = Table::new();
        for place in 0..MAX_VIEWS {
            assert_eq!(table.enter(1, holder("x", 0)), Some(place));
        }
        assert_eq!(table.enter(1, holder("x", 0)), None);
        table.remove(40);
        assert_eq!(table.enter(1, holder("x", 0)), Some(40));
    }
}

#[cfg(all(test, loom))]
mod loom_tests {
    use super::*;
    use loom::cell::UnsafeCell;
    use loom::sync::Arc;
    use loom::sync::atomic::AtomicBool;
    use loom::thread;

    /// All words of a holder carry the same number, so that a mixture of two shows.
    fn holder(number: u32) -> Holder<'static> {
        Holder { name: if number == 1 { "1" } else { "2" }, process: number, thread: number, since_us: number.into() }
    }

    #[test]
    fn loom_no_reader_sees_a_mixture_of_two_holders() {
        loom::model(|| {
            let table = Arc::new(Table::<u32>::new());
            let writer = Arc::clone(&table);
            let thread = thread::spawn(move || {
                for number in [1, 2] {
                    let place = writer.enter(number, holder(number)).unwrap();
                    assert_eq!(place, 0, "the place is free again");
                    writer.remove(place);
                }
            });
            for seen in table.all() {
                let name = seen.name[0].to_ne_bytes()[0] - b'0';
                assert_eq!([seen.process, seen.thread, seen.since_us as u32, name.into()], [seen.slot; 4]);
            }
            thread.join().unwrap();
            assert!(table.is_empty());
        });
    }

    /// The memory of a view.
    struct Memory(UnsafeCell<u32>);
    // SAFETY: for loom's checked cell only; loom reports any access that is not ordered.
    unsafe impl Sync for Memory {}
    // SAFETY: as above.
    unsafe impl Send for Memory {}

    /// Entered before the view exists, removed after it is gone: who knows of a view and finds it in the table no more may use its memory.
    #[test]
    fn loom_a_view_that_is_not_in_the_table_is_gone() {
        loom::model(|| {
            let table = Arc::new(Table::<u32>::new());
            let memory = Arc::new(Memory(UnsafeCell::new(0)));
            let exists = Arc::new(AtomicBool::new(false));
            let view = {
                let (table, memory, exists) = (Arc::clone(&table), Arc::clone(&memory), Arc::clone(&exists));
                thread::spawn(move || {
                    let place = table.enter(0, holder(1)).unwrap();
                    exists.store(true, Ordering::Release);
                    // SAFETY: loom checks that nobody else uses it at the same time.
                    memory.0.with_mut(|cell| unsafe { *cell += 1 });
                    table.remove(place);
                })
            };
            if exists.load(Ordering::Acquire) && table.is_empty() {
                // SAFETY: as above.
                assert_eq!(memory.0.with(|cell| unsafe { *cell }), 1);
            }
            view.join().unwrap();
        });
    }

    #[test]
    fn loom_two_views_at_once_take_two_places() {
        loom::model(|| {
            let table = Arc::new(Table::<u32>::new());
            let other = Arc::clone(&table);
            let thread = thread::spawn(move || {
                let place = other.enter(1, holder(1)).unwrap();
                other.reach(place, 1);
                place
            });
            let own = table.enter(2, holder(2)).unwrap();
            table.reach(own, 2);
            let place = thread.join().unwrap();
            assert_ne!(place, own);
            assert_eq!((table.view(place, 1), table.view(own, 2), table.view(own, 1)), (Some(1), Some(2), None));
            table.remove(place);
            table.remove(own);
            assert!(table.is_empty());
        });
    }
}
