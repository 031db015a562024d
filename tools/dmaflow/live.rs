//! The line on a terminal that says how a pipe is doing.

use std::time::Duration;

use dmaflow::pipe::Progress;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

/// The line is written this often at most, in µs.
const PERIOD_US: u64 = 250_000;

/// A line on stderr, if that is a terminal; nothing otherwise.
pub struct Live {
    bar: Option<ProgressBar>,
    /// When the line was written last, in µs, and the frames shown until then.
    last: Option<(u64, u64)>,
    /// How many moves have been told.
    told: usize,
}

impl Live {
    pub fn new(limit: Option<u64>) -> Live {
        use std::io::IsTerminal;
        let bar = std::io::stderr().is_terminal().then(|| {
            let bar = ProgressBar::with_draw_target(limit, ProgressDrawTarget::stderr());
            bar.set_style(ProgressStyle::with_template("{msg}").unwrap_or_else(|_| ProgressStyle::default_spinner()));
            bar
        });
        Live { bar, last: None, told: 0 }
    }

    /// Takes the numbers after a frame; writes them now and then, and each move at once, above them.
    pub fn update(&mut self, now: &Progress<'_>) {
        let Some(bar) = &self.bar else { return };
        for step in now.moves.iter().skip(self.told) {
            bar.println(format!("frame {}: {} to {}: {}", step.frame, step.from, step.to, step.why));
        }
        self.told = now.moves.len();
        let Some((at_us, presented)) = self.last else {
            self.last = Some((now.at_us, now.presented));
            return;
        };
        let elapsed = now.at_us.saturating_sub(at_us);
        if elapsed < PERIOD_US {
            return;
        }
        let fps = (now.presented - presented) as f64 / Duration::from_micros(elapsed).as_secs_f64();
        let latency = now
            .latency_us
            .map_or(String::new(), |us| format!("  latency {:.1} ms", us as f64 / 1000.0));
        bar.set_message(format!(
            "{:6.1} fps  {}  {} shown  {} dropped{latency}",
            fps, now.rung, now.presented, now.dropped
        ));
        self.last = Some((now.at_us, now.presented));
    }

    /// Takes the line away.
    pub fn end(self) {
        if let Some(bar) = self.bar {
            bar.finish_and_clear();
        }
    }
}
