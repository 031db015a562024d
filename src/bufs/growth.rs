//! What only grows from look to look: leaks.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use super::{Inventory, Process, Totals};

/// How often a number must have grown before it counts as one that only grows.
const GROWTHS: u32 = 4;

/// Each time that a number shrinks, twice as many growths are asked for, up to this.
const MOST_GROWTHS: u32 = 64;

/// From the first of these growths to the last there must lie at least this: what a program opens when it starts is no leak.
const SPAN: Duration = Duration::from_secs(2);

/// After so many looks without anything, a process or exporter is forgotten.
const FORGOTTEN_AFTER: u32 = 100;

/// Whose numbers are followed.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub enum Subject {
    /// An exporter, by name.
    Exporter(Option<String>),
    /// A process, by what its name does not change.
    Process {
        /// Its number.
        pid: i32,
        /// When it started, in clock ticks after the machine did.
        start: u64,
    },
}

impl Subject {
    /// A process.
    pub fn process(process: &Process) -> Subject {
        Subject::Process { pid: process.pid, start: process.start }
    }
}

/// Which number.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub enum Measure {
    /// How many buffers.
    Buffers,
    /// Their bytes.
    Bytes,
    /// How many descriptors (of processes): a buffer that is open once more is no more memory, and a leak all the same.
    Fds,
}

/// A number that only grows.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Growth {
    /// Which.
    pub measure: Measure,
    /// What it was at first, or after it last shrank.
    pub from: u64,
    /// What it is.
    pub to: u64,
    /// At how many looks it was more than at the one before.
    pub times: u32,
    /// How long it took from `from` to `to`.
    pub over: Duration,
}

/// Follows the inventories of a machine.
///
/// A number *only grows* if since the first look, or since it last shrank, it has grown at four looks at least, two seconds at
/// least from the first of them to the last; and the last is not longer ago than twice the longest pause between two. Each time
/// that a number has shrunk, twice as many growths are asked for, 64 at most. So a program that opens all its buffers when it
/// starts is not meant, nor, before long, one whose number goes up and down; one more buffer a second is found after four.
#[derive(Debug, Default)]
pub struct Watch {
    tracks: HashMap<(Subject, Measure), Track>,
    seen: HashMap<u64, Instant>,
}

impl Watch {
    /// Knows nothing yet.
    pub fn new() -> Watch {
        Watch::default()
    }

    /// Takes in the next inventory and its sums, seen at `now`.
    pub fn look(&mut self, inventory: &Inventory, totals: &Totals, now: Instant) {
        let mut seen = HashMap::with_capacity(inventory.buffers.len());
        for listed in &inventory.buffers {
            seen.insert(listed.inode, self.seen.get(&listed.inode).copied().unwrap_or(now));
        }
        self.seen = seen;
        let mut values = HashMap::new();
        for exporter in &totals.exporters {
            let subject = Subject::Exporter(exporter.exporter.clone());
            values.insert((subject.clone(), Measure::Buffers), exporter.sum.buffers);
            values.insert((subject, Measure::Bytes), exporter.sum.bytes);
        }
        for process in &totals.processes {
            let subject = Subject::process(&process.process);
            values.insert((subject.clone(), Measure::Buffers), process.sum.buffers);
            values.insert((subject.clone(), Measure::Bytes), process.sum.bytes);
            values.insert((subject, Measure::Fds), process.fds);
        }
        self.tracks.retain(|key, track| {
            track.take(values.remove(key).unwrap_or(0), now);
            track.looks_without < FORGOTTEN_AFTER
        });
        self.tracks
            .extend(values.into_iter().map(|(key, value)| (key, Track::new(value, now))));
    }

    /// How long before `now` a buffer was first seen; `None` for one that the last inventory did not have.
    pub fn seen_for(&self, inode: u64, now: Instant) -> Option<Duration> {
        Some(now.saturating_duration_since(*self.seen.get(&inode)?))
    }

    /// The numbers of `subject` that only grow.
    pub fn growths(&self, subject: &Subject, now: Instant) -> Vec<Growth> {
        let measures = [Measure::Buffers, Measure::Bytes, Measure::Fds];
        let growth = |measure: Measure| self.tracks.get(&(subject.clone(), measure))?.growth(measure, now);
        measures.into_iter().filter_map(growth).collect()
    }
}

/// One number.
#[derive(Debug)]
struct Track {
    from: u64,
    since: Instant,
    last: u64,
    growths: u32,
    needed: u32,
    first_growth: Instant,
    last_growth: Instant,
    longest_pause: Duration,
    looks_without: u32,
}

impl Track {
    fn new(value: u64, now: Instant) -> Track {
        Track {
            from: value,
            since: now,
            last: value,
            growths: 0,
            needed: GROWTHS,
            first_growth: now,
            last_growth: now,
            longest_pause: Duration::ZERO,
            looks_without: 0,
        }
    }

    fn take(&mut self, value: u64, now: Instant) {
        self.looks_without = if value == 0 { self.looks_without + 1 } else { 0 };
        if value < self.last {
            let needed = self.needed.saturating_mul(2).min(MOST_GROWTHS);
            *self = Track { needed, looks_without: self.looks_without, ..Track::new(value, now) };
        } else if value > self.last {
            if self.growths == 0 {
                self.first_growth = now;
            } else {
                self.longest_pause = self.longest_pause.max(now.saturating_duration_since(self.last_growth));
            }
            self.growths = self.growths.saturating_add(1);
            self.last_growth = now;
            self.last = value;
        }
    }

    fn growth(&self, measure: Measure, now: Instant) -> Option<Growth> {
        let enough =
            self.growths >= self.needed && self.last_growth.saturating_duration_since(self.first_growth) >= SPAN;
        let goes_on = now.saturating_duration_since(self.last_growth) <= self.longest_pause.saturating_mul(2);
        (enough && goes_on).then(|| Growth {
            measure,
            from: self.from,
            to: self.last,
            times: self.growths,
            over: self.last_growth.saturating_duration_since(self.since),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::super::{ExporterSum, ProcessSum, Sum};
    use super::*;
    use proptest::prelude::*;

    /// Whether the number is marked after each of these values, seen `interval` apart.
    fn marks(values: &[u64], interval: Duration) -> Vec<bool> {
        let start = Instant::now();
        let mut watch = Watch::new();
        let subject = Subject::Exporter(Some("udmabuf".into()));
        let look = |(index, value): (u32, &u64)| {
            let now = start + interval * index;
            let sum = Sum { buffers: *value, bytes: value * 4096 };
            let exporters = match value {
                0 => vec![],
                _ => vec![ExporterSum { exporter: Some("udmabuf".into()), sum }],
            };
            watch.look(&Inventory::default(), &Totals { exporters, ..Totals::default() }, now);
            !watch.growths(&subject, now).is_empty()
        };
        (0_u32..).zip(values).map(look).collect()
    }

    const SECOND: Duration = Duration::from_secs(1);

    #[test]
    fn a_leak_is_found_at_its_fourth_growth() {
        assert_eq!(marks(&[1, 2, 3, 4, 5, 6], SECOND), [false, false, false, false, true, true]);
        // One in three looks, and two at once.
        assert!(marks(&[1, 1, 1, 2, 2, 2, 4, 4, 4, 5, 5, 5, 6], SECOND)[12]);
        // As long as it goes on.
        let mut stopped = vec![1, 2, 3, 4, 5];
        stopped.extend([5; 3]);
        assert_eq!(marks(&stopped, SECOND), [false, false, false, false, true, true, true, false]);
    }

    #[test]
    fn what_starts_or_goes_up_and_down_is_not_meant() {
        assert!(!marks(&[0, 4, 4, 4, 4, 4, 4, 4], SECOND).contains(&true));
        let start: Vec<_> = (0..10).chain([10; 50]).collect();
        assert!(!marks(&start, Duration::from_millis(100)).contains(&true));
        assert!(!marks(&[1, 2, 3, 4].repeat(10), SECOND).contains(&true));
        // A burst after a shrink is not enough; a leak that goes on is.
        assert_eq!(marks(&[5, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10], SECOND).iter().position(|mark| *mark), Some(9));
    }

    #[test]
    fn a_descriptor_of_the_same_buffer_is_a_leak_too() {
        let start = Instant::now();
        let mut watch = Watch::new();
        let process = Process { pid: 5, start: 7, name: "x".into() };
        for second in 0..6 {
            let sum = ProcessSum {
                process: process.clone(),
                fds: 1 + u64::from(second),
                maps: 0,
                sum: Sum { buffers: 1, bytes: 4096 },
                share: 4096,
            };
            let totals = Totals { processes: vec![sum], ..Totals::default() };
            watch.look(&Inventory::default(), &totals, start + SECOND * second);
        }
        let growths = watch.growths(&Subject::process(&process), start + SECOND * 5);
        let expected = Growth { measure: Measure::Fds, from: 1, to: 6, times: 5, over: SECOND * 5 };
        assert_eq!(growths, [expected]);
        // Another process of the same number is another.
        let other = Process { start: 8, ..process };
        assert!(watch.growths(&Subject::process(&other), start + SECOND * 5).is_empty());
    }

    #[test]
    fn what_is_gone_is_forgotten() {
        let mut values = vec![3];
        values.extend([0; 120]);
        let start = Instant::now();
        let mut watch = Watch::new();
        for (index, value) in (0_u32..).zip(&values) {
            let sum = Sum { buffers: *value, bytes: *value };
            let exporters = if *value > 0 { vec![ExporterSum { exporter: None, sum }] } else { vec![] };
            watch.look(&Inventory::default(), &Totals { exporters, ..Totals::default() }, start + SECOND * index);
        }
        assert!(watch.tracks.is_empty());
    }

    proptest! {
        #[test]
        fn steady_numbers_are_never_marked(value in 1_u64..1000, looks in 1_usize..200, millis in 1_u64..100_000) {
            prop_assert!(!marks(&vec![value; looks], Duration::from_millis(millis)).contains(&true));
        }

        #[test]
        fn who_shrinks_is_not_marked_then(values in prop::collection::vec(0_u64..50, 2..100)) {
            let marks = marks(&values, SECOND);
            for (index, pair) in values.windows(2).enumerate() {
                prop_assert!(!(pair[1] < pair[0] && marks[index + 1]));
            }
        }
    }
}
