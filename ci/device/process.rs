//! The command under test as a child process, and what a test must leave as it was.

use std::collections::BTreeSet;
use std::fs;
use std::io::Read;
use std::os::unix::process::ExitStatusExt;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;

use crate::{harness, modules};

/// No single run of the command takes longer, not even under emulation on a busy machine.
const LIMIT: Duration = Duration::from_secs(150);
/// The same in the long forms, whose runs have hundreds of frames.
const LONG_LIMIT: Duration = Duration::from_secs(3600);

/// The command with its arguments (separated by blanks), its output to be caught.
pub fn dmaflow(arguments: &str) -> Command {
    let path = std::env::var("PATH").unwrap_or_default();
    let on_path = path
        .split(':')
        .map(|folder| format!("{folder}/dmaflow"))
        .find(|file| fs::metadata(file).is_ok());
    let mut command = Command::new(on_path.unwrap_or_else(|| env!("CARGO_BIN_EXE_dmaflow").to_owned()));
    command.args(arguments.split_whitespace());
    command
}

/// `pipe` from vivid to vkms with these further arguments.
pub fn pipe(arguments: &str) -> Command {
    dmaflow(&format!("pipe --from vivid --to vkms --json {arguments}"))
}

/// Runs a shell command line that must succeed, and gives what it printed.
pub fn sh(line: &str) -> Result<String> {
    let mut command = Command::new("sh");
    command.args(["-c", line]);
    let run = finish(&mut command)?;
    ensure!(run.status.success(), "`{line}`: {}\n{}", run.status, run.stderr);
    Ok(run.stdout)
}

/// A command that has ended.
pub struct Run {
    pub what: String,
    pub status: ExitStatus,
    pub stdout: String,
    pub stderr: String,
}

/// A command that runs; killed when dropped.
pub struct Running {
    what: String,
    child: Child,
    stdout: Option<thread::JoinHandle<String>>,
    stderr: Option<thread::JoinHandle<String>>,
}

/// Starts a command. Its output is caught unless it was sent elsewhere by `stdout_set`.
pub fn start(command: &mut Command) -> Result<Running> {
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    start_as_it_is(command)
}

/// As [`start`], with the streams that the caller has set.
pub fn start_as_it_is(command: &mut Command) -> Result<Running> {
    let arguments: Vec<_> = command
        .get_args()
        .map(|argument| argument.to_string_lossy().into_owned())
        .collect();
    let what = format!("`{} {}`", command.get_program().to_string_lossy(), arguments.join(" "));
    let mut child = command.spawn().with_context(|| format!("cannot start {what}"))?;
    let stdout = child.stdout.take().map(collect);
    let stderr = child.stderr.take().map(collect);
    Ok(Running { what, child, stdout, stderr })
}

/// Runs a command to its end.
pub fn finish(command: &mut Command) -> Result<Run> {
    start(command)?.end()
}

impl Running {
    pub fn pid(&self) -> Pid {
        Pid::from_raw(self.child.id().cast_signed())
    }

    pub fn signal(&self, signal: Signal) -> Result<()> {
        kill(self.pid(), signal).with_context(|| format!("cannot send {signal} to {}", self.what))
    }

    /// Whether it has not ended yet.
    pub fn runs(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(None))
    }

    /// Waits until a picture of its is on screen and some frames have followed.
    pub fn wait_until_it_shows(&mut self) -> Result<()> {
        self.wait_until("to show pictures", |_| modules::screen().contains("allocated by = dmaflow"))?;
        thread::sleep(Duration::from_millis(200));
        ensure!(self.runs(), "{} ended before it was to", self.what);
        Ok(())
    }

    /// Waits until something is so of its process.
    pub fn wait_until(&mut self, what: &str, mut is: impl FnMut(Pid) -> bool) -> Result<()> {
        let start = Instant::now();
        while !is(self.pid()) {
            if !self.runs() {
                let stderr = self
                    .stderr
                    .take()
                    .map(|reader| reader.join().unwrap_or_default())
                    .unwrap_or_default();
                bail!("{} ended before it began {what}: {stderr}", self.what);
            }
            ensure!(start.elapsed() < Duration::from_secs(30), "{} did not begin {what}", self.what);
            thread::sleep(Duration::from_millis(5));
        }
        Ok(())
    }

    /// Waits for its end.
    pub fn end(mut self) -> Result<Run> {
        let limit = if harness::long() { LONG_LIMIT } else { LIMIT };
        let Some(status) = harness::wait(&mut self.child, limit) else {
            bail!("{} did not end within {} s", self.what, limit.as_secs());
        };
        let text = |reader: Option<thread::JoinHandle<String>>| reader.map(|r| r.join().unwrap_or_default());
        let stdout = text(self.stdout.take()).unwrap_or_default();
        let stderr = text(self.stderr.take()).unwrap_or_default();
        Ok(Run { what: self.what.clone(), status, stdout, stderr })
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // Fails if it has ended, which is the aim.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Run {
    /// The result, which must be the only thing on stdout; the exit status must be this one.
    pub fn json(&self, status: i32) -> Result<Value> {
        self.has_status(status)?;
        let value: Value = serde_json::from_str(&self.stdout)
            .with_context(|| format!("{}: stdout is no JSON: {:?}", self.what, self.stdout))?;
        ensure!(value.is_object(), "{}: not an object: {value}", self.what);
        ensure!(
            self.stdout.trim_end_matches('\n').lines().count() == 1,
            "{}: more than one line: {}",
            self.what,
            self.stdout
        );
        Ok(value)
    }

    pub fn has_status(&self, status: i32) -> Result<()> {
        ensure!(
            self.status.code() == Some(status),
            "{}: {} (signal {:?}) instead of exit status {status}\nstderr: {}\nstdout: {}",
            self.what,
            self.status,
            self.status.signal(),
            self.stderr.trim(),
            self.stdout.trim()
        );
        Ok(())
    }

    /// The one line that explains a failure: alone on stderr, naming all of `words`, with nothing of a debug output.
    pub fn one_line(&self, status: i32, words: &[&str]) -> Result<&str> {
        self.has_status(status)?;
        let mut lines = self.stderr.lines();
        let line = lines.next().ok_or_else(|| anyhow!("{}: nothing on stderr", self.what))?;
        ensure!(lines.next().is_none(), "{}: more than one line on stderr:\n{}", self.what, self.stderr);
        ensure!(line.starts_with("error: "), "{}: not marked as an error: {line}", self.what);
        for word in words {
            ensure!(line.contains(word), "{}: the line does not name {word:?}: {line}", self.what);
        }
        let twice = line.match_indices("os error").count() > 1;
        ensure!(!twice, "{}: the cause is said twice: {line}", self.what);
        Ok(line)
    }
}

/// A number in a result, by the path to it: `frames/captured`.
pub fn number(value: &Value, path: &str) -> Result<u64> {
    let found = path.split('/').try_fold(value, |value, key| value.get(key));
    found
        .and_then(Value::as_u64)
        .ok_or_else(|| anyhow!("{path} is not a number in {value}"))
}

fn collect(mut from: impl Read + Send + 'static) -> thread::JoinHandle<String> {
    thread::spawn(move || {
        let mut bytes = Vec::new();
        let _ = from.read_to_end(&mut bytes);
        String::from_utf8_lossy(&bytes).into_owned()
    })
}

/// The processes of a process group, without those that have ended.
pub fn of_group(group: Pid) -> Vec<i32> {
    let pids = fs::read_dir("/proc").into_iter().flatten().flatten();
    let pids = pids.filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok());
    pids.filter(|pid| {
        // `pid (comm) state ppid pgrp …`; the command may hold blanks and parentheses.
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        let fields: Vec<_> = stat.rsplit(')').next().unwrap_or_default().split_whitespace().collect();
        matches!(fields.as_slice(), [state, _, pgrp, ..] if *state != "Z" && pgrp.parse() == Ok(group.as_raw()))
    })
    .collect()
}

pub fn command_of(pid: i32) -> String {
    let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    String::from_utf8_lossy(&line).replace('\0', " ").trim().to_owned()
}

/// The inodes of all dma-bufs of the machine.
pub fn dma_bufs() -> BTreeSet<u64> {
    let text = fs::read_to_string("/sys/kernel/debug/dma_buf/bufinfo").unwrap_or_default();
    // `size flags mode count exp_name ino name`, under two lines of heading.
    let entry = |line: &str| {
        let fields: Vec<_> = line.split_whitespace().collect();
        let size_first = fields.first()?.parse::<u64>().is_ok();
        if size_first && fields.len() >= 6 { fields[5].parse().ok() } else { None }
    };
    text.lines().filter_map(entry).collect()
}

/// What must be after a test as it was before: what is on screen, the framebuffers of the card, the dma-bufs.
pub struct State {
    screen: String,
    dma_bufs: BTreeSet<u64>,
}

impl State {
    pub fn read() -> State {
        State { screen: modules::screen(), dma_bufs: dma_bufs() }
    }

    /// The dma-bufs that were not there then.
    pub fn new_dma_bufs(&self) -> BTreeSet<u64> {
        dma_bufs().difference(&self.dma_bufs).copied().collect()
    }

    /// What is not as it was, now.
    pub fn changes(&self) -> Vec<String> {
        let now = State::read();
        let mut changes = Vec::new();
        let new: Vec<_> = now.dma_bufs.difference(&self.dma_bufs).map(u64::to_string).collect();
        if !new.is_empty() {
            changes.push(format!("dma-bufs {}", new.join(" ")));
        }
        if now.screen != self.screen {
            changes.push(format!("another picture on the display:\n{}", difference(&self.screen, &now.screen)));
        }
        changes
    }

    /// What is not as it was. The kernel frees some things a moment after the last close, so this waits for it.
    pub fn left_behind(&self) -> Vec<String> {
        let start = Instant::now();
        loop {
            let left = self.changes();
            if left.is_empty() || start.elapsed() > Duration::from_secs(2) {
                return left;
            }
            thread::sleep(Duration::from_millis(20));
        }
    }

    /// Fails unless everything is as it was.
    pub fn is_back(&self) -> Result<()> {
        let left = self.left_behind();
        ensure!(left.is_empty(), "not as before: {}", left.join("; "));
        Ok(())
    }
}

/// The lines that two texts do not share.
fn difference(before: &str, after: &str) -> String {
    let only = |a: &str, b: &str, mark: &str| {
        let others: Vec<_> = b.lines().collect();
        let lines: Vec<_> = a
            .lines()
            .filter(|line| !others.contains(line))
            .map(|line| format!("{mark} {}", line.trim()))
            .collect();
        lines.join("\n")
    };
    format!("{}\n{}", only(before, after, "-"), only(after, before, "+"))
}
