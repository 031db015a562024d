//! Frames that a camera dropped: sequence numbers that are missing.

use super::*;

impl Camera {
    /// Counts the frames missing between the last sequence number and this one. Numbers wrap at 2^32; a step backwards
    /// (a driver that starts again) is no loss.
    pub(super) fn count_gap(&mut self, meta: FrameMeta) {
        let step = self.last.map_or(1, |last| meta.sequence.wrapping_sub(last.sequence));
        if (2..=u32::MAX / 2).contains(&step) {
            let lost = u64::from(step - 1);
            self.counts.dropped += lost;
            self.counts.starved += if self.dry { lost } else { 0 };
        }
        self.last = Some(meta);
    }

    /// At the end of a flow: a gap is only seen with the frame after it, so what has come and nobody took is looked at as well. Where
    /// the driver had nothing to fill, no later frame can tell, and that is said.
    pub(super) fn count_the_end(&mut self) {
        let most = self.buffers().len();
        for _ in 0..most {
            let State::Streaming(queue) = &mut self.queue else { return };
            let Some(meta) = queue.discard() else { break };
            let dry = queue.slots().queued() == 0;
            self.count_gap(meta);
            self.dry = dry;
        }
        let State::Streaming(queue) = &self.queue else { return };
        if self.ended || queue.counts().queued > 0 {
            return;
        }
        // The moment at which a frame was due that found no buffer, where that can be known.
        let due = self.last.and_then(|last| {
            let period = 1e6 / self.rate.and_then(Rate::fps)?;
            let time = last.timestamp;
            (time.clock == Clock::Monotonic).then(|| time.us.saturating_add(period as u64))
        });
        self.counts.uncounted |= due.is_none_or(|due| now_us() >= due);
    }
}
