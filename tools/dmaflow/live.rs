//! The line on a terminal that says how a pipe is doing.

use std::time::Duration;

use dmaflow::pipe::Progress;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

/// The line is written this often at most, in µs.
const PERIOD_US: u64 = 250_000;

/// A line on stderr, if that is a terminal; nothing otherwise.
pub struct Live {
    bar: Option<ProgressBar>,
    last: Option<Progress>,
}

impl Live {
    pub fn new(limit: Option<u64>) -> Live {
        use std::io::IsTerminal;
        let bar = std::io::stderr().is_terminal().then(|| {
            let bar = ProgressBar::with_draw_target(limit, ProgressDrawTarget::stderr());
            bar.set_style(ProgressStyle::with_template("{msg}").unwrap_or_else(|_| ProgressStyle::default_spinner()));
            bar
        });
        Live { bar, last: None }
    }

    /// Takes the numbers after a frame; writes them now and then.
    pub fn update(&mut self, now: &Progress) {
        let Some(bar) = &self.bar else { return };
        let Some(last) = self.last else {
            self.last = Some(*now);
            return;
        };
        let elapsed = now.at_us.saturating_sub(last.at_us);
        if elapsed < PERIOD_US {
            return;
        }
        let fps = (now.presented - last.presented) as f64 / Duration::from_micros(elapsed).as_secs_f64();
        let latency = now
            .latency_us
            .map_or(String::new(), |us| format!("  latency {:.1} ms", us as f64 / 1000.0));
        bar.set_message(format!(
            "{:6.1} fps  {}  {} shown  {} dropped{latency}",
            fps, now.rung, now.presented, now.dropped
        ));
        self.last = Some(*now);
    }

    /// Takes the line away.
    pub fn end(self) {
        if let Some(bar) = self.bar {
            bar.finish_and_clear();
        }
    }
}
