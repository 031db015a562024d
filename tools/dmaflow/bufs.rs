//! `dmaflow bufs`: every dma-buf of the machine, once or again and again.

use std::collections::BTreeMap;
use std::io::{self, IsTerminal};
use std::os::fd::AsFd;
use std::process::ExitCode;
use std::time::{Duration, Instant, SystemTime};

use anyhow::Context;
use dmaflow::bufs::{Inventory, Totals, Watch};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signalfd::SignalFd;

use crate::args::BufsArgs;
use crate::bufs_report::{Report, Watched, unseen};
use crate::output;
use crate::stop::catch_signals;

pub fn run(args: &BufsArgs) -> anyhow::Result<ExitCode> {
    output::check()?;
    if args.watch {
        return watch(args);
    }
    let inventory = Inventory::take()?;
    let report = Report::new(&inventory, &Totals::of(&inventory), None, SystemTime::now());
    output::print(&if args.json { report.json()? } else { report.table().join("\n") })?;
    unseen(&inventory.unseen).iter().for_each(|line| output::note(line));
    Ok(ExitCode::SUCCESS)
}

fn watch(args: &BufsArgs) -> anyhow::Result<ExitCode> {
    let stop = catch_signals()?;
    let mut view = match (args.json, io::stdout().is_terminal()) {
        (true, _) => View::Json,
        (false, true) => View::Screen { is_clear: false },
        (false, false) => View::Lines(None),
    };
    let mut watch = Watch::new();
    let mut first = None;
    let mut next = Instant::now();
    loop {
        let inventory = Inventory::take()?;
        let totals = Totals::of(&inventory);
        let now = Instant::now();
        watch.look(&inventory, &totals, now);
        let watched = Watched { watch: &watch, now, since: *first.get_or_insert(now) };
        let report = Report::new(&inventory, &totals, Some(&watched), SystemTime::now());
        let unseen = unseen(&inventory.unseen);
        if now == watched.since {
            unseen.iter().for_each(|line| output::note(line));
        }
        if let Some(text) = view.text(&report, unseen)? {
            match output::print(&text) {
                Err(error) if nobody_reads(&error) => return Ok(ExitCode::SUCCESS),
                printed => printed?,
            }
        }
        next += args.interval;
        if next < Instant::now() {
            // The look took longer than the interval: a pause all the same, and no looks to catch up.
            next = Instant::now() + args.interval;
        }
        if !wait(&stop, next)? {
            return Ok(ExitCode::SUCCESS);
        }
    }
}

/// How what was seen gets to stdout.
enum View {
    /// One object a line.
    Json,
    /// A table that is drawn anew at the same place.
    Screen { is_clear: bool },
    /// A table, then a line for each change.
    Lines(Option<Known>),
}

/// What the lines have told so far.
#[derive(Default)]
struct Known {
    buffers: BTreeMap<u64, String>,
    growing: BTreeMap<String, String>,
}

impl View {
    /// What is to be printed now, without the last line end.
    fn text(&mut self, report: &Report, unseen: Vec<String>) -> anyhow::Result<Option<String>> {
        match self {
            View::Json => Ok(Some(report.json()?)),
            View::Screen { is_clear } => {
                let size = terminal_size::terminal_size();
                let (width, height) =
                    size.map_or((80, 24), |(width, height)| (usize::from(width.0), usize::from(height.0)));
                // What stderr said of it is no longer on the screen.
                let mut lines = report.table();
                lines.splice(1..1, unseen);
                let clear = if std::mem::replace(is_clear, true) { "" } else { "\x1b[2J" };
                Ok(Some(format!("{clear}{}", screen(&lines, width, height))))
            }
            View::Lines(known) => {
                let now = Known { buffers: report.buffer_lines(), growing: report.growing() };
                let text = match known {
                    None => Some(report.table().join("\n")),
                    Some(before) => {
                        let lines = changes(before, &now);
                        let time = format!("{:8.1} s", report.watched_seconds());
                        let lines: Vec<_> = lines.iter().map(|line| format!("{time}  {line}")).collect();
                        (!lines.is_empty()).then(|| lines.join("\n"))
                    }
                };
                *known = Some(now);
                Ok(text)
            }
        }
    }
}

fn changes(before: &Known, now: &Known) -> Vec<String> {
    let mut lines = Vec::new();
    // What there is in one and not in the other.
    fn only<'a, K: Ord, V>(a: &'a BTreeMap<K, V>, b: &BTreeMap<K, V>) -> Vec<(&'a K, &'a V)> {
        a.iter().filter(|(key, _)| !b.contains_key(key)).collect()
    }
    let buffers = [("gone", only(&before.buffers, &now.buffers)), ("new ", only(&now.buffers, &before.buffers))];
    for (what, found) in buffers {
        lines.extend(found.iter().map(|(_, line)| format!("{what}  {line}")));
    }
    let growing = only(&now.growing, &before.growing);
    lines.extend(growing.iter().map(|(who, how)| format!("{who} only grows: {how}")));
    let ended = only(&before.growing, &now.growing);
    lines.extend(ended.iter().map(|(who, _)| format!("{who} does not only grow any more")));
    lines
}

/// The lines that fit, drawn over what is there.
fn screen(lines: &[String], width: usize, height: usize) -> String {
    // The line below the last is the cursor's.
    let room = height.saturating_sub(1).max(1);
    let cut = |line: &str| line.chars().take(width).collect::<String>();
    let mut drawn: Vec<String> = lines.iter().take(room).map(|line| cut(line)).collect();
    if lines.len() > room
        && let Some(last) = drawn.last_mut()
    {
        *last = cut(&format!("… and {} more lines", lines.len() - room + 1));
    }
    let drawn: Vec<_> = drawn.iter().map(|line| format!("{line}\x1b[K")).collect();
    format!("\x1b[H{}\x1b[J", drawn.join("\n"))
}

/// Waits until `end`; false if that is no use: a signal has come, or nobody reads stdout any more.
fn wait(stop: &SignalFd, end: Instant) -> anyhow::Result<bool> {
    let stdout = io::stdout();
    loop {
        let left = end.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Ok(true);
        }
        // Up to the next millisecond, so as not to come back too early.
        let timeout = PollTimeout::try_from(left + Duration::from_millis(1)).unwrap_or(PollTimeout::MAX);
        let mut fds = [PollFd::new(stop.as_fd(), PollFlags::POLLIN), PollFd::new(stdout.as_fd(), PollFlags::empty())];
        match poll(&mut fds, timeout) {
            Ok(0) | Err(Errno::EINTR) => {}
            Ok(_) => return Ok(false),
            Err(error) => return Err(error).context("cannot wait"),
        }
    }
}

fn nobody_reads(error: &anyhow::Error) -> bool {
    let mut causes = error.chain().filter_map(|cause| cause.downcast_ref::<io::Error>());
    causes.any(|cause| cause.kind() == io::ErrorKind::BrokenPipe)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_does_not_fit_is_counted() {
        let lines = ["one", "two", "three", "four"].map(str::to_owned);
        assert_eq!(screen(&lines[..2], 80, 24), "\x1b[Hone\x1b[K\ntwo\x1b[K\x1b[J");
        assert_eq!(screen(&lines, 9, 3), "\x1b[Hone\x1b[K\n… and 3 m\x1b[K\x1b[J");
        assert_eq!(screen(&lines, 0, 0), "\x1b[H\x1b[K\x1b[J");
    }

    #[test]
    fn changes_are_told_once() {
        let known = |buffers: &[u64], growing: &[&str]| Known {
            buffers: buffers.iter().map(|inode| (*inode, format!("inode {inode}"))).collect(),
            growing: growing.iter().map(|who| ((*who).to_owned(), "1 to 5".to_owned())).collect(),
        };
        let before = known(&[1, 2], &["system"]);
        let lines = changes(&before, &known(&[2, 3], &["udmabuf"]));
        assert_eq!(
            lines,
            ["gone  inode 1", "new   inode 3", "udmabuf only grows: 1 to 5", "system does not only grow any more"]
        );
        assert!(changes(&before, &before).is_empty());
    }
}
