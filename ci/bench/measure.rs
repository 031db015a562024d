//! Runs a program and tells what it used.

use std::fs;
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};
use nix::libc;

/// What a program used from its start to its end, all its threads together.
#[derive(Clone, Copy, Debug)]
pub struct Usage {
    /// CPU time in user space and in the kernel, in nanoseconds. The kernel gives it in microseconds.
    pub cpu_ns: u64,
    /// The most memory that it had at one time, in KiB.
    pub peak_resident_kib: u64,
}

/// Runs a program to its end.
pub fn run(command: &[String]) -> Result<Usage> {
    let log = std::env::temp_dir().join("bench.log");
    let mut child = prepare(command)?;
    child.stderr(fs::File::create(&log)?);
    // SAFETY: the closure does nothing, so nothing that is forbidden between fork and exec. It is here because its
    // being there makes the library fork, and not share this process's memory until exec: the kernel counts the memory
    // before exec into the child's peak, and a fork takes over little of it.
    unsafe { child.pre_exec(|| Ok(())) };
    let child = child.spawn().with_context(|| command.join(" "))?;
    let mut status = 0;
    // SAFETY: a C structure of integers: zeroes are a value of it.
    let mut usage: libc::rusage = unsafe { std::mem::zeroed() };
    // Not `Child::wait`: it does not tell what the child used. Dropping a `Child` waits for nothing.
    // SAFETY: both pointers are to live variables of the types that wait4 writes.
    while unsafe { libc::wait4(child.id().cast_signed(), &mut status, 0, &mut usage) } == -1 {
        let error = std::io::Error::last_os_error();
        if error.raw_os_error() != Some(libc::EINTR) {
            return Err(error).context("wait for the program");
        }
    }
    if status != 0 {
        let log = fs::read_to_string(&log).unwrap_or_default();
        bail!("{}\nended with wait status {status:#x}; its last words:\n{}", command.join(" "), log.trim_end());
    }
    let micros = |time: libc::timeval| time.tv_sec as u64 * 1_000_000 + time.tv_usec as u64;
    Ok(Usage {
        cpu_ns: (micros(usage.ru_utime) + micros(usage.ru_stime)) * 1000,
        peak_resident_kib: usage.ru_maxrss as u64,
    })
}

/// How many system calls a program makes from its start to its end, all its threads together; those of these names alone, if there are any.
pub fn system_calls(command: &[String], names: &[&str]) -> Result<u64> {
    let table = std::env::temp_dir().join("bench.strace");
    let mut all: Vec<String> = ["strace", "-f", "-c", "-U", "calls,name", "-o"].map(str::to_owned).into();
    all.push(table.display().to_string());
    all.extend_from_slice(command);
    run(&all)?;
    let text = fs::read_to_string(&table)?;
    // "  12 write", and at the end "  34 total".
    let rows = text.lines().filter_map(|line| {
        let (calls, name) = line.trim().split_once(char::is_whitespace)?;
        Some((name.trim(), calls.parse::<u64>().ok()?))
    });
    let rows: Vec<_> = rows.collect();
    let of = |wanted: &str| rows.iter().find(|(name, _)| *name == wanted).map(|(_, calls)| *calls);
    let total = of("total").with_context(|| format!("strace's table has no total:\n{text}"))?;
    Ok(if names.is_empty() { total } else { names.iter().filter_map(|name| of(name)).sum() })
}

/// The size of the display's mode, as in `640x480`, that dmaflow says it has used. `None` if it does not run.
pub fn mode_of(command: &[String]) -> Option<String> {
    let output = prepare(command)
        .ok()?
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .output()
        .ok()?;
    let result: serde_json::Value = serde_json::from_slice(&output.stdout).ok()?;
    // "Virtual-1 640x480"
    let (_, size) = result.get("mode")?.as_str()?.rsplit_once(' ')?;
    Some(size.to_owned())
}

fn prepare(command: &[String]) -> Result<Command> {
    let (program, arguments) = command.split_first().context("an empty command")?;
    let mut child = Command::new(program);
    child.args(arguments).stdin(Stdio::null()).stdout(Stdio::null());
    Ok(child)
}
