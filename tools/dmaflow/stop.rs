//! Orders to stop.

use anyhow::Context;
use nix::errno::Errno;
use nix::libc;
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};

/// Ctrl-C and `kill` as a descriptor to poll, so that they come between two frames and never inside a step.
pub fn catch_signals() -> anyhow::Result<SignalFd> {
    let mut signals = SigSet::empty();
    for signal in [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP] {
        // `nohup`, and a shell for a job in its background, have some of them ignored: so they stay.
        if !ignored(signal).context("cannot ask about signals")? {
            signals.add(signal);
        }
    }
    signals.thread_block().context("cannot block signals")?;
    SignalFd::with_flags(&signals, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK).context("cannot catch signals")
}

fn ignored(signal: Signal) -> anyhow::Result<bool> {
    // SAFETY: a C structure of integers, a pointer-sized handler and an optional function pointer: zeroes are a value of it.
    let mut old: libc::sigaction = unsafe { std::mem::zeroed() };
    // SAFETY: with no new action the call only writes the old one, to a live variable of its type (sigaction(2)).
    Errno::result(unsafe { libc::sigaction(signal as libc::c_int, std::ptr::null(), &mut old) })?;
    Ok(old.sa_sigaction == libc::SIG_IGN)
}
