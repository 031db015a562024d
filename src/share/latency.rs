//! How long consumers take to take a frame.

use super::ring::Delays;

/// So many frames count: two seconds at 60 a second.
const RECENT: usize = 128;

/// How long after it was published a consumer has taken a frame, in µs: over the last 128 that it took. Where it waits for frames, this is
/// the time until it is awake and looks. Of several that it took between two publications, each counts as their mean.
///
/// It is the consumer that tells, by a word in the ring, so that nobody is woken for it; whoever wants to deceive can.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct LatencyInfo {
    /// Half of them were taken no later than this.
    pub median_us: u64,
    /// 99 % were.
    pub p99_us: u64,
    /// All were.
    pub max_us: u64,
    /// How many these are, from 1 to 128.
    pub measured: u64,
}

/// Those of one consumer.
#[derive(Debug)]
pub(super) struct Latencies {
    recent: [u32; RECENT],
    count: usize,
}

impl Latencies {
    pub(super) fn new() -> Latencies {
        Latencies { recent: [0; RECENT], count: 0 }
    }

    /// Adds what a consumer has told. Anything may be in it.
    pub(super) fn add(&mut self, told: Delays) {
        match told.frames {
            0 => {}
            1 => self.push(told.sum_us),
            _ => self.add_several(told),
        }
    }

    /// Apart, because it is rare and there is a division in it.
    #[cold]
    fn add_several(&mut self, told: Delays) {
        let Some(mean_us) = told.sum_us.checked_div(told.frames) else { return };
        for _ in 0..told.frames.min(RECENT as u64) {
            self.push(mean_us);
        }
    }

    fn push(&mut self, us: u64) {
        // The remainder is less than the number of places.
        self.recent[self.count % RECENT] = u32::try_from(us).unwrap_or(u32::MAX);
        self.count = self.count.wrapping_add(1);
    }

    /// None if there are none. Cost: they are sorted.
    pub(super) fn info(&self) -> Option<LatencyInfo> {
        let mut recent = self.recent;
        let measured = self.count.min(RECENT);
        let sorted = &mut recent[..measured];
        sorted.sort_unstable();
        // The nearest rank: the least that so many hundredths do not exceed.
        let at = |hundredths: usize| sorted.get((measured * hundredths).div_ceil(100).checked_sub(1)?).copied();
        Some(LatencyInfo {
            median_us: at(50)?.into(),
            p99_us: at(99)?.into(),
            max_us: at(100)?.into(),
            measured: measured as u64,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(all: impl IntoIterator<Item = u32>) -> Option<(u64, u64, u64, u64)> {
        let mut latencies = Latencies::new();
        all.into_iter()
            .for_each(|us| latencies.add(Delays { frames: 1, sum_us: us.into() }));
        let info = latencies.info()?;
        Some((info.median_us, info.p99_us, info.max_us, info.measured))
    }

    #[test]
    fn the_newest_count_and_in_any_order() {
        assert_eq!(of([]), None);
        assert_eq!(of([7]), Some((7, 7, 7, 1)));
        assert_eq!(of([30, 10, 20]), Some((20, 30, 30, 3)));
        assert_eq!(of([40, 10, 30, 20]), Some((20, 40, 40, 4)));
        // 128 of 1 to 128: the 64th, the 127th, the last.
        assert_eq!(of((1..=128).rev()), Some((64, 127, 128, 128)));
        // The first 100 are forgotten.
        assert_eq!(of([u32::MAX; 100].into_iter().chain(1..=128)), Some((64, 127, 128, 128)));
    }

    #[test]
    fn several_count_as_their_mean() {
        let mut latencies = Latencies::new();
        for (frames, sum_us) in [(0, 0), (0, 7), (3, 100), (1, 50)] {
            latencies.add(Delays { frames, sum_us });
        }
        let info = latencies.info().unwrap();
        assert_eq!((info.median_us, info.max_us, info.measured), (33, 50, 4));
        // Of who tells anything.
        latencies.add(Delays { frames: (1 << 24) - 1, sum_us: 0 });
        latencies.add(Delays { frames: 1, sum_us: u64::MAX });
        let info = latencies.info().unwrap();
        assert_eq!((info.median_us, info.max_us, info.measured), (0, u64::from(u32::MAX), 128));
    }
}
