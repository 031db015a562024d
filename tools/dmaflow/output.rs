//! stdout carries the result alone; everything else goes to stderr.

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;

use anyhow::{Context, anyhow};
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

/// Makes sure before anything starts that the result can be written.
///
/// A program started with stdout closed gets `/dev/null` there from Rust's start-up code, so that the result would vanish
/// without an error. That one is open for reading and writing, while `>/dev/null` of a shell is for writing alone.
pub fn check() -> anyhow::Result<()> {
    let stdout = io::stdout();
    let fd = stdout.as_fd();
    let null = std::fs::metadata("/dev/null").map(|null| null.rdev()).unwrap_or(0);
    let same = File::from(fd.try_clone_to_owned().context("cannot look at stdout")?)
        .metadata()?
        .rdev()
        == null;
    let mode = fcntl(fd, FcntlArg::F_GETFL)
        .map(OFlag::from_bits_truncate)
        .context("cannot look at stdout")?;
    if same && mode & OFlag::O_ACCMODE == OFlag::O_RDWR {
        return Err(anyhow!("cannot write the result: stdout is closed"));
    }
    Ok(())
}

/// Writes the result to stdout.
pub fn print(text: &str) -> anyhow::Result<()> {
    let mut stdout = io::stdout().lock();
    writeln!(stdout, "{text}")
        .and_then(|()| stdout.flush())
        .context("cannot write the result to stdout")
}

/// Writes a line for people to stderr. If that cannot be done there is nobody left to tell.
pub fn complain(line: &str) {
    let _ = writeln!(io::stderr(), "{line}");
}

/// As [`complain`], marked with the program's name.
pub fn note(line: &str) {
    complain(&format!("dmaflow: {line}"));
}

/// As [`note`], but for a stderr that nobody reads and that is full: then the line is left out, for to write it would be to wait. To be used
/// where others choose how many lines there are. (A pipe is writable while a whole page of it is free: pipe_poll in fs/pipe.c.)
pub fn note_unless_full(line: &str) {
    let stderr = io::stderr();
    let mut fds = [PollFd::new(stderr.as_fd(), PollFlags::POLLOUT)];
    if poll(&mut fds, PollTimeout::ZERO) == Ok(1) {
        note(line);
    }
}
