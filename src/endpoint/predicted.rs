//! What a sink that verifies has predicted of the frames on their way, and how that was met.

use super::Verdict;
use crate::error::{Error, Kind, Result};
use crate::frame::{Frame, MAX_SLOTS};

/// Sums predicted, by the slots of the frames that they are of.
#[derive(Debug)]
pub(crate) struct Predicted {
    /// Of each slot, the frame captured into it last. A source may have more slots than buffers: a
    /// [`Receiver`](crate::share::Receiver) has one for each frame that is held. So there is a place for each that a queue can have.
    frames: [Option<Prediction>; MAX_SLOTS as usize],
    verdict: Verdict,
}

#[derive(Clone, Copy, Debug)]
struct Prediction {
    sequence: u32,
    /// Among all captured, counted from 0.
    place: u64,
    sum: u32,
}

fn about(frame: &Frame, why: &str) -> Error {
    Error::new(Kind::Invalid, "verify", format!("frame {}", frame.meta().sequence)).because(why.to_owned())
}

impl Predicted {
    pub(crate) fn new() -> Predicted {
        Predicted { frames: [None; MAX_SLOTS as usize], verdict: Verdict::default() }
    }

    /// Keeps what was predicted of a frame, which has just been read for it.
    ///
    /// # Errors
    /// [`Kind::Revoked`]: who shares the frame has taken it back, and what was read may be of another picture.
    pub(crate) fn expect(&mut self, frame: &Frame, place: u64, sum: u32) -> Result<()> {
        frame.check()?;
        let slot = self.frames.get_mut(frame.slot() as usize);
        *slot.ok_or_else(|| about(frame, "its slot is none of a queue's"))? =
            Some(Prediction { sequence: frame.meta().sequence, place, sum });
        Ok(())
    }

    /// Compares a frame's sum with the one predicted.
    ///
    /// # Errors
    /// [`Kind::Revoked`], and then there is no verdict on this frame; [`Kind::Invalid`] if nothing was predicted for it.
    pub(crate) fn compare(&mut self, frame: &Frame, sum: u32) -> Result<()> {
        frame.check()?;
        let sequence = frame.meta().sequence;
        let predicted = self.frames.get(frame.slot() as usize).copied().flatten();
        let predicted = predicted
            .filter(|predicted| predicted.sequence == sequence)
            .ok_or_else(|| about(frame, "nothing was predicted for it: it was presented without being inspected"))?;
        self.verdict.checked += 1;
        if predicted.sum != sum {
            self.verdict.wrong += 1;
            self.verdict.first_wrong.get_or_insert((predicted.place, sequence));
        }
        Ok(())
    }

    pub(crate) fn verdict(&self) -> Verdict {
        self.verdict
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::{Format, Layout};
    use crate::frame::{Buffer, FrameMeta, Holding, Slots, SlotsArc};
    use crate::memory::Allocator;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicBool, Ordering};

    struct Held(Arc<AtomicBool>);

    impl Holding for Held {
        fn holds(&self, _: u32) -> bool {
            self.0.load(Ordering::Relaxed)
        }
    }

    fn frame(slots: &SlotsArc, slot: u32, sequence: u32) -> Frame {
        let layout = Layout::packed(Format::parse("GREY").unwrap().0, (8, 8), 1).unwrap();
        let buffer = Buffer::new(layout, vec![Allocator::Plain.allocate(64).unwrap()], &[64]).unwrap();
        let meta = FrameMeta { sequence, ..FrameMeta::default() };
        Frame::new(buffer, meta, Slots::dequeued(slots, slot).unwrap())
    }

    /// All slots are in use, each of a frame that may be taken back.
    fn slots() -> (SlotsArc, Arc<AtomicBool>) {
        let holds = Arc::new(AtomicBool::new(true));
        let slots = Slots::revocable(MAX_SLOTS, Box::new(Held(Arc::clone(&holds))));
        slots.take_free().for_each(|slot| slot.queued());
        (slots, holds)
    }

    /// Receivers number the frames that they hold, however few buffers they have.
    #[test]
    fn any_slot_of_a_queue_will_do() {
        let (slots, _) = slots();
        let mut predicted = Predicted::new();
        for (place, slot) in (0..).zip([0, 31, MAX_SLOTS - 1]) {
            let frame = frame(&slots, slot, slot);
            predicted.expect(&frame, place, 7).unwrap();
            predicted.compare(&frame, if slot == 31 { 8 } else { 7 }).unwrap();
        }
        assert_eq!(predicted.verdict(), Verdict { checked: 3, wrong: 1, first_wrong: Some((1, 31)) });
        let other = frame(&slots, 1, 1);
        assert_eq!(predicted.compare(&other, 7).unwrap_err().kind(), Kind::Invalid, "nothing was predicted");
    }

    #[test]
    fn there_is_no_verdict_on_what_was_taken_back() {
        let (slots, holds) = slots();
        let mut predicted = Predicted::new();
        let frame = frame(&slots, 2, 5);
        predicted.expect(&frame, 0, 7).unwrap();
        holds.store(false, Ordering::Relaxed);
        assert_eq!(predicted.compare(&frame, 8).unwrap_err().kind(), Kind::Revoked);
        assert_eq!(predicted.expect(&frame, 0, 7).unwrap_err().kind(), Kind::Revoked);
        assert_eq!(predicted.verdict(), Verdict::default());
    }
}
