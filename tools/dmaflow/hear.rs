//! What drivers' libraries print on stderr while they are asked: heard, and put where it belongs.

use std::fs::File;
use std::io::{self, Read, Seek};
use std::os::fd::{AsFd, OwnedFd};

use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::unistd::dup2_stderr;

/// Puts stderr back, whatever happens meanwhile.
struct Back(OwnedFd);

impl Drop for Back {
    fn drop(&mut self) {
        // Nobody is left to be told if this fails.
        let _ = dup2_stderr(&self.0);
    }
}

/// Does this, and gives the lines that were printed on stderr meanwhile, each once. Where stderr cannot be led elsewhere they appear there.
/// To be called while no other thread has something to say.
pub fn hear<T>(what: impl FnOnce() -> T) -> (T, Vec<String>) {
    let Ok((back, heard)) = divert() else { return (what(), Vec::new()) };
    let result = what();
    drop(back);
    (result, lines(heard).unwrap_or_default())
}

fn divert() -> io::Result<(Back, File)> {
    let heard = memfd_create("dmaflow: heard", MFdFlags::MFD_CLOEXEC)?;
    let back = Back(io::stderr().as_fd().try_clone_to_owned()?);
    dup2_stderr(&heard)?;
    Ok((back, File::from(heard)))
}

fn lines(mut heard: File) -> io::Result<Vec<String>> {
    let mut bytes = Vec::new();
    heard.rewind()?;
    heard.read_to_end(&mut bytes)?;
    let mut lines: Vec<String> = Vec::new();
    for line in String::from_utf8_lossy(&bytes).lines().map(str::trim_end) {
        if !line.is_empty() && !lines.iter().any(|known| known == line) {
            lines.push(line.to_owned());
        }
    }
    Ok(lines)
}
