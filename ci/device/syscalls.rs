//! How many system calls a frame costs: the difference of a long and a short run leaves start-up and end out.

use std::collections::BTreeMap;
use std::fs;

use anyhow::{Context, Result, ensure};

use crate::harness::{Outcome, PASSED, Test, note};
use crate::process::{finish, number, pipe};

const NEEDS: &[&str] = &["vivid", "vkms", "strace"];

pub const TESTS: &[Test] = &[
    Test { name: "syscalls::fifo", needs: NEEDS, seconds: 180, run: fifo },
    Test { name: "syscalls::mailbox", needs: NEEDS, seconds: 180, run: mailbox },
];

const SHORT: u64 = 60;
const LONG: u64 = 660;

/// poll, DQBUF, ATOMIC, QBUF.
fn fifo() -> anyhow::Result<Outcome> {
    at_most("fifo", 4.1)
}

/// The same, and for the flip event one more poll and a read.
fn mailbox() -> anyhow::Result<Outcome> {
    at_most("mailbox", 6.1)
}

fn at_most(present: &str, limit: f64) -> anyhow::Result<Outcome> {
    let short = calls(present, SHORT)?;
    let long = calls(present, LONG)?;
    let sum = |calls: &BTreeMap<String, u64>| calls.values().sum::<u64>();
    ensure!(sum(&short) > SHORT && sum(&long) > sum(&short), "strace saw nothing: {short:?} {long:?}");
    let a_frame = (sum(&long) as f64 - sum(&short) as f64) / (LONG - SHORT) as f64;
    note(&format!("{a_frame:.3} system calls a frame"));
    let more = long.iter().filter_map(|(call, count)| {
        let more = count.saturating_sub(short.get(call).copied().unwrap_or(0));
        (more > 5).then(|| format!("{more} {call}"))
    });
    let more: Vec<_> = more.collect();
    ensure!(a_frame <= limit, "{a_frame:.3} calls a frame, at most {limit}: {}", more.join(", "));
    // Less than a DQBUF and a QBUF would mean that frames were lost on the way, not that they were cheap.
    ensure!(a_frame > 2.0, "only {a_frame:.3} calls a frame: {}", more.join(", "));
    PASSED
}

/// The calls of one run by name, all threads together.
fn calls(present: &str, frames: u64) -> Result<BTreeMap<String, u64>> {
    let table = format!("/tmp/strace.{}", std::process::id());
    let inner = pipe(&format!("--format XR24 --size 640x360 --fps 60 --frames {frames} --present {present}"));
    let mut command = std::process::Command::new("strace");
    command
        .args(["-f", "-c", "-o", &table])
        .arg(inner.get_program())
        .args(inner.get_args());
    let result = finish(&mut command)?.json(0)?;
    ensure!(number(&result, "frames/captured")? == frames && result["path"] == "exported", "{result}");
    let text = fs::read_to_string(&table).context("strace left no table")?;
    fs::remove_file(&table)?;
    // `% time  seconds  usecs/call  calls  [errors]  syscall`
    let row = |line: &str| {
        let fields: Vec<_> = line.split_whitespace().collect();
        let name = *fields.last()?;
        (fields.first()?.parse::<f64>().is_ok() && name != "total")
            .then(|| Some((name.to_owned(), fields.get(3)?.parse().ok()?)))?
    };
    Ok(text.lines().filter_map(row).collect())
}
