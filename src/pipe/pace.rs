//! Whether to wait for the next frame, or to ask for it at once.
//!
//! A sink that blocks until a frame is shown may block so long that the next frame has come meanwhile. Then waiting is a system call
//! for nothing. Whether it is so does not change from frame to frame but with the phase between camera and display, so it is tried
//! now and then, and kept as long as it holds.

/// How often the other way is tried, in frames. While frames come early this is also how often the order to stop is looked for.
const TRY_EVERY: u32 = 16;

/// Remembers which way was right.
#[derive(Debug, Default)]
pub(super) struct Pace {
    early: bool,
    frames: u32,
}

impl Pace {
    /// Whether to ask at once for the next frame.
    pub(super) fn ask_at_once(&mut self) -> bool {
        self.frames = self.frames.wrapping_add(1);
        self.early != self.frames.is_multiple_of(TRY_EVERY)
    }

    /// What came of asking at once.
    pub(super) fn asked(&mut self, found: bool) {
        self.early = found;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Plays `frames` frames; gives how often it asked at once and how often in vain.
    fn play(frames: u32, early: bool) -> (u32, u32) {
        let (mut pace, mut asked, mut vain) = (Pace::default(), 0, 0);
        for _ in 0..frames {
            if pace.ask_at_once() {
                asked += 1;
                vain += u32::from(!early);
                pace.asked(early);
            }
        }
        (asked, vain)
    }

    #[test]
    fn frames_that_are_early_are_not_waited_for() {
        let (asked, _) = play(1600, true);
        assert!((1480..=1500).contains(&asked), "{asked}");
    }

    #[test]
    fn frames_that_are_not_are_asked_for_in_vain_one_time_in_sixteen() {
        assert_eq!(play(1600, false), (100, 100));
    }

    #[test]
    fn it_follows_a_change() {
        let mut pace = Pace::default();
        for _ in 0..32 {
            if pace.ask_at_once() {
                pace.asked(true);
            }
        }
        assert!(pace.ask_at_once());
        pace.asked(false);
        assert!(!pace.ask_at_once());
    }
}
