//! Ctrl-C and `kill` at any moment: the result is printed, the display put back, the memory freed.

use std::fs;
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use nix::sys::signal::Signal;
use nix::unistd::Pid;

use crate::harness::{Outcome, PASSED, Test, note};
use crate::modules::Witness;
use crate::process::{State, dmaflow, number, pipe, start};

const NEEDS: &[&str] = &["vivid", "vkms"];

pub const TESTS: &[Test] = &[
    Test { name: "signals::fifty_moments", needs: NEEDS, seconds: 600, run: fifty_moments },
    Test { name: "signals::while_it_waits_for_a_frame", needs: NEEDS, seconds: 60, run: while_it_waits_for_a_frame },
    Test { name: "signals::two_in_a_row", needs: NEEDS, seconds: 60, run: two_in_a_row },
    Test { name: "signals::what_was_ignored_stays_so", needs: NEEDS, seconds: 60, run: what_was_ignored_stays_so },
];

const MOMENTS: u32 = 50;

/// The latest moment, in seconds. Most are earlier: in the first half second everything is opened, agreed on and set up.
const LATEST: f64 = 3.0;

/// On a busy host all is slower, from the start of the program on: the latest moment is so many times as late as the signals are caught.
/// Then 34 of 100 moments are before that.
const LATER: f64 = 25.0;

fn fifty_moments() -> anyhow::Result<Outcome> {
    let seed = match std::env::var("DMAFLOW_SEED") {
        Ok(seed) => seed.parse().context("DMAFLOW_SEED is not a number")?,
        Err(_) => {
            u64::from(std::process::id()) << 32 | u64::from(fs::read_to_string("/proc/uptime")?.len() as u32) ^ now()
        }
    };
    note(&format!("DMAFLOW_SEED={seed}"));
    let mut random = Random(seed | 1);
    let (mut early, mut in_order) = (0, 0);
    let witness = Witness::new()?;
    let before = State::read();
    let begins = until_it_catches()?;
    let latest = LATEST.max(LATER * begins);
    note(&format!("signals are caught after {:.0} ms; the latest moment is after {latest:.1} s", begins * 1000.0));
    for moment in 0..MOMENTS {
        let signal = if moment % 2 == 0 { Signal::SIGINT } else { Signal::SIGTERM };
        let present = if moment % 4 < 2 { "fifo" } else { "mailbox" };
        let verify = if moment % 5 == 0 { "--verify" } else { "" };
        let after = Duration::from_secs_f64(latest * random.unit().powi(3));
        let what = || format!("moment {moment}: {signal} after {after:?}, {present} {verify}");
        match stopped(&format!("--format XR24 --size 640x360 --present {present} {verify}"), signal, after)
            .with_context(what)?
        {
            Stopped::Early => early += 1,
            Stopped::InOrder => in_order += 1,
        }
        before.is_back().with_context(what)?;
    }
    drop(witness);
    note(&format!("{in_order} ended in order, {early} before the command had begun"));
    // A command that never catches its signals would end every time before it had begun.
    ensure!(early <= MOMENTS / 2, "{early} of {MOMENTS} died");
    PASSED
}

/// How many seconds the command takes from its start until it catches signals; the longest of three times.
fn until_it_catches() -> Result<f64> {
    let mut longest = 0.0_f64;
    for _ in 0..3 {
        let begin = Instant::now();
        let mut running = start(&mut pipe("--format XR24 --size 640x360"))?;
        let pid = running.pid();
        running.wait_until("to catch signals", |_| is_blocked(pid, Signal::SIGINT).unwrap_or(false))?;
        longest = longest.max(begin.elapsed().as_secs_f64());
        running.signal(Signal::SIGINT)?;
        running.end()?.has_status(0)?;
    }
    Ok(longest)
}

enum Stopped {
    /// Before `main` could block the signal, and so before anything was open.
    Early,
    InOrder,
}

fn stopped(options: &str, signal: Signal, after: Duration) -> Result<Stopped> {
    let mut running = start(&mut pipe(options))?;
    thread::sleep(after);
    let pid = running.pid();
    ensure!(running.runs(), "it ended by itself: {:?}", running.end().map(|run| run.stderr));
    // Looked at first: what is not blocked now may be when the signal comes, and then the end must be in order as well.
    let blocked = is_blocked(pid, signal)?;
    let devices = open_devices(pid);
    running.signal(signal)?;
    let run = running.end()?;
    if !blocked && run.status.code().is_none() {
        ensure!(devices.is_empty(), "signals are not caught although {devices:?} is open");
        ensure!(run.stdout.is_empty(), "{}", run.stdout);
        return Ok(Stopped::Early);
    }
    let result = run.json(0)?;
    let (captured, presented) = (number(&result, "frames/captured")?, number(&result, "frames/presented")?);
    ensure!(presented <= captured, "{result}");
    if let Some(verify) = result.get("verify") {
        ensure!(number(verify, "wrong")? == 0 && number(verify, "checked")? == presented, "{result}");
    }
    ensure!(run.stderr.is_empty(), "stderr: {}", run.stderr);
    Ok(Stopped::InOrder)
}

/// Whether the process blocks the signal, which is how dmaflow catches it.
fn is_blocked(pid: Pid, signal: Signal) -> Result<bool> {
    let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
    let mask = status
        .lines()
        .find_map(|line| line.strip_prefix("SigBlk:"))
        .context("no SigBlk")?;
    let mask = u64::from_str_radix(mask.trim(), 16)?;
    Ok(mask & (1 << (signal as i32 - 1)) != 0)
}

fn open_devices(pid: Pid) -> Vec<String> {
    let fds = fs::read_dir(format!("/proc/{pid}/fd")).into_iter().flatten().flatten();
    let targets = fds.filter_map(|entry| Some(fs::read_link(entry.path()).ok()?.display().to_string()));
    targets
        .filter(|target| target.starts_with("/dev/video") || target.starts_with("/dev/dri"))
        .collect()
}

/// At 1 frame a second it waits nearly always; the signal must end the wait and not the next frame.
fn while_it_waits_for_a_frame() -> anyhow::Result<Outcome> {
    let witness = Witness::new()?;
    let before = State::read();
    for signal in [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP] {
        let mut running = start(&mut pipe("--format XR24 --size 640x360 --fps 1"))?;
        running.wait_until_it_shows()?;
        let start = Instant::now();
        running.signal(signal)?;
        let run = running.end()?;
        let result = run.json(0)?;
        ensure!(number(&result, "frames/captured")? >= 1, "{result}");
        note(&format!("{signal}: {:.0} ms to the end", start.elapsed().as_secs_f64() * 1000.0));
        before.is_back()?;
    }
    drop(witness);
    PASSED
}

/// The second Ctrl-C of an impatient person may not leave the display dark.
fn two_in_a_row() -> anyhow::Result<Outcome> {
    let witness = Witness::new()?;
    let before = State::read();
    for _ in 0..3 {
        let mut running = start(&mut pipe("--format XR24 --size 640x360"))?;
        running.wait_until_it_shows()?;
        running.signal(Signal::SIGINT)?;
        running.signal(Signal::SIGINT)?;
        let _ = running.signal(Signal::SIGTERM);
        running.end()?.json(0)?;
        before.is_back()?;
    }
    drop(witness);
    // The same for a sink that is no display.
    let mut running = start(&mut dmaflow("pipe --from pattern --to null --json"))?;
    thread::sleep(Duration::from_millis(700));
    ensure!(running.runs(), "it ended by itself");
    running.signal(Signal::SIGINT)?;
    running.end()?.json(0)?;
    PASSED
}

/// As after `nohup`, and for a job in a shell's background.
fn what_was_ignored_stays_so() -> anyhow::Result<Outcome> {
    let line = "trap '' HUP INT; exec dmaflow pipe --from vivid --to vkms --format XR24 --size 640x360 --json";
    let mut running = start(Command::new("sh").args(["-c", line]))?;
    running.wait_until_it_shows()?;
    for signal in [Signal::SIGHUP, Signal::SIGINT] {
        running.signal(signal)?;
        thread::sleep(Duration::from_millis(300));
        ensure!(running.runs(), "{signal} ended it");
    }
    running.signal(Signal::SIGTERM)?;
    running.end()?.json(0)?;
    PASSED
}

fn now() -> u64 {
    std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .map_or(1, |time| time.as_nanos() as u64)
}

/// xorshift64: moments that can be had again from a seed.
struct Random(u64);

impl Random {
    /// From 0 to 1.
    fn unit(&mut self) -> f64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 11) as f64 / (1_u64 << 53) as f64
    }
}
