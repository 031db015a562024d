//! What a process has that it could keep for ever.

use std::fs;

use anyhow::{Context, Result};
use nix::unistd::Pid;

/// Resident memory that is the process's own, in KiB.
pub fn memory(pid: Pid) -> Result<u64> {
    let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("RssAnon:"))
        .context("no RssAnon")?;
    Ok(line.trim().trim_end_matches(" kB").parse()?)
}

/// What a process has of the kernel's, besides memory of its own.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Held {
    /// Open descriptors.
    pub fds: usize,
    /// Rings and buffers that are mapped: memory that is not the process's own, so [`memory`] does not tell of it.
    pub mappings: usize,
}

impl Held {
    pub fn of(pid: Pid) -> Result<Held> {
        let fds = fs::read_dir(format!("/proc/{pid}/fd"))?.count();
        let maps = fs::read_to_string(format!("/proc/{pid}/maps"))?;
        Ok(Held { fds, mappings: maps.lines().filter(|line| is_shared(line)).count() })
    }
}

/// Whether a name in /proc is that of memory which processes share: of a ring, or of a buffer.
fn is_shared(name: &str) -> bool {
    name.contains("/memfd:") || name.contains("/dmabuf:")
}

/// So many descriptors of such memory has a process.
pub fn shared_fds(pid: Pid) -> Result<usize> {
    let mut count = 0;
    for entry in fs::read_dir(format!("/proc/{pid}/fd"))? {
        // One that is closed meanwhile is none.
        let name = fs::read_link(entry?.path()).unwrap_or_default();
        count += usize::from(is_shared(&name.to_string_lossy()));
    }
    Ok(count)
}

/// The inodes of the rings that a process has mapped: a server one for each consumer, and that one the same.
pub fn rings(pid: Pid) -> Result<Vec<String>> {
    let maps = fs::read_to_string(format!("/proc/{pid}/maps"))?;
    let rings = maps.lines().filter(|line| line.contains("/memfd:dmaflow-ring"));
    // Addresses, rights, offset, device, inode, name.
    rings
        .map(|line| line.split_whitespace().nth(4).map(str::to_owned).context("no inode"))
        .collect()
}

/// Whether a process is a consumer of the server that has these rings.
pub fn is_one_of(pid: Pid, theirs: &[String]) -> Result<bool> {
    let own = rings(pid)?;
    Ok(!own.is_empty() && own.iter().all(|ring| theirs.contains(ring)))
}
