//! What the words of a ring's entry are: which buffer a frame is in, and what is known of it.
//!
//! Seven words of 64 bits in the machine's own byte order: both sides are on one machine. From the lowest bit on:
//!
//! | word | bits | what |
//! |---|---|---|
//! | 0 | 32 generation, 32 index of the buffer | as the messages `format` and `buffer` have said them |
//! | 1 | 64 | when it was captured, in µs |
//! | 2 | 32 sequence number, 2 clock of word 1 (0 unknown, 1 `CLOCK_MONOTONIC`, 2 copied), 1 damaged, 1 last, 1 stamped at the start of the exposure, 1 fenced | as of the source, but for the last; the other bits are 0 |
//! | 3 | 32, 32 | bytes used of memory planes 0 and 1 |
//! | 4 | 32, 32 | bytes used of memory planes 2 and 3 |
//! | 5 | 64 | frames before this one that this consumer did not get, all since its welcome |
//! | 6 | 64 | when it was published, in µs of `CLOCK_MONOTONIC`: its lease counts from here |
//!
//! Fenced: a device still writes the frame. The fence that says when it has done so has come by the socket before (message `fence` of
//! `wire.rs`): before it has signalled the memory does not hold the picture.
//!
//! The receiver checks generation and index against what it was told, and takes bytes used for no more than a buffer has.

use super::ring::WORDS;
use crate::format::MAX_PLANES;
use crate::frame::{Clock, FrameFlags, FrameMeta, MAX_SLOTS, Timestamp};

/// See the [module](self).
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(super) struct Entry {
    pub generation: u32,
    pub buffer: u32,
    pub meta: FrameMeta,
    pub skipped: u64,
    pub published_us: u64,
    /// An acquire fence belongs to it.
    pub fenced: bool,
}

/// Words that are no entry.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("word {word} of a frame's entry holds {found:#x}")]
pub(super) struct Malformed {
    word: usize,
    found: u64,
}

/// Bits of word 2 behind the sequence number.
const CLOCK: u32 = 32;
const DAMAGED: u64 = 1 << 34;
const LAST: u64 = 1 << 35;
const START: u64 = 1 << 36;
const FENCED: u64 = 1 << 37;

fn pair(low: u32, high: u32) -> u64 {
    u64::from(low) | u64::from(high) << 32
}

/// Low and high half.
fn halves(word: u64) -> (u32, u32) {
    // Each is cut to what it is: 32 bits.
    (word as u32, (word >> 32) as u32)
}

impl Entry {
    pub(super) fn encode(&self) -> [u64; WORDS] {
        let FrameMeta { sequence, timestamp, bytes_used, flags } = self.meta;
        let clock = match timestamp.clock {
            Clock::Unknown => 0,
            Clock::Monotonic => 1,
            Clock::Copied => 2,
        };
        let bit = |set, bit| if set { bit } else { 0 };
        let marks = bit(flags.error, DAMAGED) | bit(flags.last, LAST) | bit(flags.start_of_exposure, START);
        let marks = marks | bit(self.fenced, FENCED);
        [
            pair(self.generation, self.buffer),
            timestamp.us,
            u64::from(sequence) | clock << CLOCK | marks,
            pair(bytes_used[0], bytes_used[1]),
            pair(bytes_used[2], bytes_used[3]),
            self.skipped,
            self.published_us,
        ]
    }

    /// # Errors
    /// [`Malformed`]: a buffer that no generation has, an unknown clock, an unknown mark.
    pub(super) fn decode(words: [u64; WORDS]) -> Result<Entry, Malformed> {
        let [place, us, facts, first, second, skipped, published_us] = words;
        let (generation, buffer) = halves(place);
        if buffer >= MAX_SLOTS {
            return Err(Malformed { word: 0, found: place });
        }
        let clock = match facts >> CLOCK & 3 {
            0 => Clock::Unknown,
            1 => Clock::Monotonic,
            2 => Clock::Copied,
            _ => return Err(Malformed { word: 2, found: facts }),
        };
        if facts >= FENCED << 1 {
            return Err(Malformed { word: 2, found: facts });
        }
        let flags =
            FrameFlags { error: facts & DAMAGED != 0, last: facts & LAST != 0, start_of_exposure: facts & START != 0 };
        let mut bytes_used = [0; MAX_PLANES];
        (bytes_used[0], bytes_used[1]) = halves(first);
        (bytes_used[2], bytes_used[3]) = halves(second);
        let meta = FrameMeta { sequence: halves(facts).0, timestamp: Timestamp { us, clock }, bytes_used, flags };
        Ok(Entry { generation, buffer, meta, skipped, published_us, fenced: facts & FENCED != 0 })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn entries() -> impl Strategy<Value = Entry> {
        let clocks = prop::sample::select(vec![Clock::Unknown, Clock::Monotonic, Clock::Copied]);
        let meta = (any::<u32>(), any::<u64>(), clocks, any::<[u32; 4]>(), any::<[bool; 4]>());
        (any::<u32>(), 0..MAX_SLOTS, meta, any::<u64>(), any::<u64>()).prop_map(
            |(generation, buffer, (sequence, us, clock, bytes_used, marks), skipped, published_us)| {
                let [error, last, start_of_exposure, fenced] = marks;
                let flags = FrameFlags { error, last, start_of_exposure };
                let meta = FrameMeta { sequence, timestamp: Timestamp { us, clock }, bytes_used, flags };
                Entry { generation, buffer, meta, skipped, published_us, fenced }
            },
        )
    }

    #[test]
    fn words_as_documented() {
        let meta = FrameMeta {
            sequence: 7,
            timestamp: Timestamp { us: 1000, clock: Clock::Monotonic },
            bytes_used: [1, 2, 3, 4],
            flags: FrameFlags { error: false, last: true, start_of_exposure: false },
        };
        let entry = Entry { generation: 2, buffer: 3, meta, skipped: 5, published_us: 1200, fenced: false };
        let words = [3 << 32 | 2, 1000, 7 | 1 << 32 | 1 << 35, 2 << 32 | 1, 4 << 32 | 3, 5, 1200];
        assert_eq!(entry.encode(), words);
        assert_eq!(Entry { fenced: true, ..entry }.encode()[2], words[2] | 1 << 37);
    }

    proptest! {
        #[test]
        fn what_is_encoded_is_decoded(entry in entries()) {
            prop_assert_eq!(Entry::decode(entry.encode()), Ok(entry));
        }

        #[test]
        fn anything_is_refused_or_means_one_thing(
            words in any::<[u64; WORDS]>(),
            buffer in 0..MAX_SLOTS + 2,
            facts in 0u64..1 << 39,
        ) {
            let mut words = words;
            words[0] = words[0] as u32 as u64 | u64::from(buffer) << 32;
            words[2] = facts;
            match Entry::decode(words) {
                Ok(entry) => prop_assert_eq!(entry.encode(), words),
                Err(_) => prop_assert!(buffer >= MAX_SLOTS || facts >> 32 & 3 == 3 || facts >> 38 != 0),
            }
        }
    }
}
