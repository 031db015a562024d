//! Frames that a receiver did not get: those that its source lost, and those that it was too late for.

/// Counts of them, from the sequence numbers of the frames that came and what the server says that it has skipped.
#[derive(Debug, Default)]
pub(super) struct Lost {
    /// Of the frame before, if it was of the same generation.
    last: Option<u32>,
    /// By the source.
    dropped: u64,
    /// Those of them since the generation began. The server may have skipped one when the next was published already: that is said with a
    /// frame after it.
    unexplained: u64,
    /// By servers before and by this receiver, and by this server.
    skipped: (u64, u64),
}

impl Lost {
    /// A frame of this sequence number came, before which `skipped` were skipped since the welcome.
    pub(super) fn came(&mut self, sequence: u32, skipped: u64) {
        let late = skipped.saturating_sub(self.skipped.1);
        self.skipped.1 = skipped;
        let Some(last) = self.last.replace(sequence) else { return };
        let ahead = sequence.wrapping_sub(last).cast_signed();
        let Ok(gap) = u64::try_from(i64::from(ahead) - 1) else {
            // A number that is not above the last, as of a camera that started again, is no gap.
            self.unexplained = 0;
            return;
        };
        let lost = gap.saturating_sub(late);
        let explained = late.saturating_sub(gap).min(self.unexplained);
        self.dropped = self.dropped.saturating_add(lost).saturating_sub(explained);
        self.unexplained = self.unexplained.saturating_add(lost).saturating_sub(explained);
    }

    /// A frame came that is in buffers which were let go of for newer ones.
    pub(super) fn passed_over(&mut self) {
        self.skipped.0 = self.skipped.0.saturating_add(1);
    }

    /// The frames that come next are others, of a generation of their own.
    pub(super) fn begin_anew(&mut self) {
        (self.last, self.unexplained) = (None, 0);
    }

    /// The frames that come next are another server's.
    pub(super) fn begin_with_another(&mut self) {
        self.skipped = (self.skipped(), 0);
    }

    pub(super) fn dropped(&self) -> u64 {
        self.dropped
    }

    pub(super) fn skipped(&self) -> u64 {
        self.skipped.0.saturating_add(self.skipped.1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn after(frames: &[(u32, u64)]) -> (u64, u64) {
        let mut lost = Lost::default();
        frames.iter().for_each(|&(sequence, skipped)| lost.came(sequence, skipped));
        (lost.dropped(), lost.skipped())
    }

    #[test]
    fn what_was_skipped_was_not_lost_by_the_source() {
        assert_eq!(after(&[(7, 0), (8, 0)]), (0, 0));
        assert_eq!(after(&[(7, 0), (12, 0)]), (4, 0), "all by the source");
        assert_eq!(after(&[(7, 0), (12, 4)]), (0, 4), "all by being late");
        assert_eq!(after(&[(7, 2), (12, 5)]), (1, 5), "some of each; and before the first nobody knows of a gap");
        // One that was skipped when the next was published already.
        assert_eq!(after(&[(7, 0), (9, 0), (10, 1)]), (0, 1));
        assert_eq!(after(&[(7, 0), (10, 0), (12, 3), (13, 3), (14, 3)]), (0, 3));
        // A camera that started again, whose numbers say nothing of those before; and around.
        assert_eq!(after(&[(100, 0), (103, 0), (0, 2), (1, 2)]), (2, 2));
        assert_eq!(after(&[(u32::MAX, 0), (2, 1)]), (1, 1));
        assert_eq!(after(&[(5, 0), (5, 0), (6, 0)]), (0, 0));
    }

    #[test]
    fn another_generation_and_another_server() {
        let mut lost = Lost::default();
        lost.came(1, 0);
        lost.came(4, 1);
        lost.begin_anew();
        lost.came(900, 3);
        assert_eq!((lost.dropped(), lost.skipped()), (1, 3));
        lost.begin_with_another();
        lost.begin_anew();
        lost.came(5, 1);
        assert_eq!((lost.dropped(), lost.skipped()), (1, 4));
        // Whatever the server says.
        lost.came(8, u64::MAX);
        lost.begin_with_another();
        lost.came(9, u64::MAX);
        assert_eq!((lost.dropped(), lost.skipped()), (1, u64::MAX));
    }
}
