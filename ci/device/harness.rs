//! Runs the tests, each in a process of its own: a panic, a hang or a leak in one is seen, named, and harms no other.

use std::fmt::Write as _;
use std::io::{Read, Write};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Child, Command, ExitCode, ExitStatus, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;

use crate::modules;
use crate::process::{self, State};

/// A test and what it needs.
#[derive(Clone, Copy)]
pub struct Test {
    pub name: &'static str,
    /// The module that must be loaded, or the program that must be there.
    pub needs: &'static [&'static str],
    /// After this many seconds it hangs. Emulation on a busy machine is several times as slow as on an idle one.
    pub seconds: u64,
    pub run: fn() -> anyhow::Result<Outcome>,
}

/// How a test that did not fail went.
pub enum Outcome {
    Passed,
    /// It could not be done here; why.
    Skipped(String),
}

pub const PASSED: anyhow::Result<Outcome> = Ok(Outcome::Passed);

/// Exit status of a test's process that has to be skipped (as in automake); the reason is on stderr.
const SKIP: u8 = 77;
const RUN_ONE: &str = "--run-one";
/// The long forms have so many times the time of the short ones.
const LONG_FACTOR: u64 = 30;
const HELP: &str = "\
usage: device [--list] [NAME…]
Runs the tests whose names contain one of NAME, or all. Prints a line for each and a summary; exits with 1 if one failed.
REQUIRE=vivid,vkms,strace   what must not be missing: a test skipped for it fails
DMAFLOW_LONG=1              every combination, and 600 frames where else a few must do (ci/test --long sets it)
DMAFLOW_SEED=N              the seed of the random moments";

pub fn main(tests: &[Test]) -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    if let [first, name] = arguments.as_slice()
        && first == RUN_ONE
    {
        return run_one(tests, name);
    }
    let mut filters = Vec::new();
    for argument in &arguments {
        match argument.as_str() {
            "--list" => {
                tests.iter().for_each(|test| println!("{}", test.name));
                return ExitCode::SUCCESS;
            }
            "--help" | "-h" => {
                println!("{HELP}");
                return ExitCode::SUCCESS;
            }
            option if option.starts_with('-') => {
                eprintln!("unknown option {option}\n{HELP}");
                return ExitCode::from(2);
            }
            name => filters.push(name.to_owned()),
        }
    }
    let chosen: Vec<_> = tests
        .iter()
        .filter(|test| filters.is_empty() || filters.iter().any(|filter| test.name.contains(filter.as_str())))
        .collect();
    if chosen.is_empty() {
        eprintln!("no test has such a name; --list shows them");
        return ExitCode::from(2);
    }
    run_all(&chosen)
}

fn run_all(tests: &[&Test]) -> ExitCode {
    let required = std::env::var("REQUIRE").unwrap_or_default();
    let required: Vec<_> = required.split(',').map(str::trim).filter(|name| !name.is_empty()).collect();
    let (mut passed, mut failed, mut skipped) = (0, Vec::new(), 0);
    for test in tests {
        let start = Instant::now();
        let ended = match test.needs.iter().find(|need| !modules::has(need)) {
            Some(missing) => Ended::Skipped(format!("{missing} is not here")),
            None => run_in_process(test),
        };
        let ended = match ended {
            // Whatever the reason: with everything there that it needs, a test has to be done.
            Ended::Skipped(why) if test.needs.iter().any(|need| required.contains(need) && !modules::has(need)) => {
                Ended::Failed(format!("{why}, and REQUIRE asks for it"))
            }
            ended => ended,
        };
        match ended {
            Ended::Passed => {
                passed += 1;
                println!("pass {} ({:.1} s)", test.name, start.elapsed().as_secs_f64());
            }
            Ended::Skipped(why) => {
                skipped += 1;
                println!("skip {}: {why}", test.name);
            }
            Ended::Failed(why) => {
                failed.push(test.name);
                println!(
                    "fail {}: {} ({:.1} s)",
                    test.name,
                    why.replace('\n', "\n  | "),
                    start.elapsed().as_secs_f64()
                );
            }
        }
    }
    if !failed.is_empty() {
        println!("failed: {}", failed.join(" "));
    }
    println!("{passed} passed, {} failed, {skipped} skipped", failed.len());
    if failed.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

enum Ended {
    Passed,
    Skipped(String),
    Failed(String),
}

/// One test in a process of its own, between two looks at the machine's state.
fn run_in_process(test: &Test) -> Ended {
    if let Err(error) = modules::reset() {
        return Ended::Failed(format!("the camera could not be put into its first state: {error:#}"));
    }
    let before = State::read();
    let child = std::env::current_exe()
        .map(Command::new)
        .unwrap_or_else(|_| Command::new("/proc/self/exe"))
        .args([RUN_ONE, test.name])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .process_group(0)
        .spawn();
    let mut child = match child {
        Ok(child) => child,
        Err(error) => return Ended::Failed(format!("it could not be started: {error}")),
    };
    let group = Pid::from_raw(child.id().cast_signed());
    let notes = collect(child.stdout.take());
    let complaints = collect(child.stderr.take());
    let seconds = test.seconds * if long() { LONG_FACTOR } else { 1 };
    let status = wait(&mut child, Duration::from_secs(seconds));
    let mut left = Vec::new();
    // A test that was killed for hanging takes its children with it; after one that ended, they are a failure.
    for pid in process::of_group(group) {
        if status.is_some() {
            left.push(format!("process {pid} ({})", process::command_of(pid)));
        }
    }
    // No such group: nothing was left, which is the aim.
    let _ = killpg(group, Signal::SIGKILL);
    let _ = child.wait();
    for line in notes.join().unwrap_or_default().lines() {
        println!("  {}: {line}", test.name);
    }
    let said = complaints.join().unwrap_or_default();
    left.extend(before.left_behind());
    let ended = match status {
        None => Ended::Failed(format!("it did not end within {seconds} s\n{said}")),
        Some(status) => match (status.code(), status.signal()) {
            (Some(0), _) => Ended::Passed,
            (Some(code), _) if code == i32::from(SKIP) => Ended::Skipped(said.trim().to_owned()),
            (Some(_), _) => Ended::Failed(said.trim().to_owned()),
            (None, signal) => Ended::Failed(format!("signal {} killed it\n{said}", signal.unwrap_or(0))),
        },
    };
    if left.is_empty() {
        return ended;
    }
    let mut why = match ended {
        Ended::Failed(why) => format!("{why}\n"),
        Ended::Passed | Ended::Skipped(_) => String::new(),
    };
    let _ = write!(why, "it left behind: {}", left.join("; "));
    if let Err(error) = modules::reload() {
        let _ = write!(why, "; and vivid could not be reloaded: {error:#}");
    }
    Ended::Failed(why)
}

fn run_one(tests: &[Test], name: &str) -> ExitCode {
    let Some(test) = tests.iter().find(|test| test.name == name) else {
        eprintln!("there is no test {name}");
        return ExitCode::from(2);
    };
    match (test.run)() {
        Ok(Outcome::Passed) => ExitCode::SUCCESS,
        Ok(Outcome::Skipped(why)) => {
            eprintln!("{why}");
            ExitCode::from(SKIP)
        }
        Err(error) => {
            eprintln!("{error:#}");
            ExitCode::FAILURE
        }
    }
}

/// What a test has to tell whether it fails or not.
pub fn note(line: &str) {
    let mut stdout = std::io::stdout().lock();
    let _ = writeln!(stdout, "{line}").and_then(|()| stdout.flush());
}

/// Whether the long forms were asked for.
pub fn long() -> bool {
    std::env::var_os("DMAFLOW_LONG").is_some_and(|value| !value.is_empty() && value != "0")
}

fn collect(from: Option<impl Read + Send + 'static>) -> thread::JoinHandle<String> {
    thread::spawn(move || {
        let mut bytes = Vec::new();
        if let Some(mut from) = from {
            let _ = from.read_to_end(&mut bytes);
        }
        String::from_utf8_lossy(&bytes).into_owned()
    })
}

/// Waits for a child; `None` if it has not ended in time, and then it is still there.
pub fn wait(child: &mut Child, limit: Duration) -> Option<ExitStatus> {
    let start = Instant::now();
    let mut pause = Duration::from_millis(1);
    loop {
        if let Ok(Some(status)) = child.try_wait() {
            return Some(status);
        }
        if start.elapsed() >= limit {
            return None;
        }
        thread::sleep(pause);
        pause = (pause * 2).min(Duration::from_millis(20));
    }
}
