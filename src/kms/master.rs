//! DRM master: the one process that may set modes on a card, and who it is.

use std::fs;
use std::path::Path;

use drm::Device as _;
use nix::libc;

use super::Card;
use crate::error::{Error, Kind, Result};

impl Card {
    /// Becomes DRM master of the card, or makes sure of being it.
    ///
    /// # Errors
    /// [`Kind::Busy`] if another process is, named with its pid where the system tells; [`Kind::Permission`] if this one may
    /// not be.
    pub(super) fn become_master(&self) -> Result<()> {
        let Err(cause) = self.acquire_master_lock() else { return Ok(()) };
        let errno = cause.raw_os_error();
        let holders = self.holders();
        let error = Error::from_io("become DRM master of", self.name(), cause);
        Err(match (holders.as_slice(), errno) {
            ([], Some(libc::EACCES)) => error.repair("only root, or the user of the active seat, may drive a display"),
            ([], _) => error.kind_is(Kind::Busy).repair("another process drives this display"),
            (holders, _) => {
                let list = holders.join(" or ");
                error
                    .kind_is(Kind::Busy)
                    .repair(format!("{list} drives this display: stop it, or use another display"))
            }
        })
    }

    /// Stops being DRM master; closing the card does so too.
    pub(super) fn give_up_master(&self) {
        // Not being master is the aim, so a refusal for that reason is no failure.
        let _ = self.release_master_lock();
    }

    /// The processes that hold the card as master; where only root could tell, those that have it open.
    fn holders(&self) -> Vec<String> {
        let own = std::process::id();
        if let Ok(clients) = fs::read_to_string(self.debugfs().join("clients")) {
            let masters = clients.lines().filter_map(master_in).filter(|(_, pid)| *pid != own);
            let masters: Vec<_> = masters.map(|(name, pid)| format!("{name} (pid {pid})")).collect();
            if !masters.is_empty() {
                return masters;
            }
        }
        let path = &self.info().path;
        let pids = fs::read_dir("/proc").into_iter().flatten().flatten();
        let pids = pids.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
        pids.filter(|&pid| pid != own && has_open(pid, path))
            .map(|pid| {
                let name = fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
                format!("{} (pid {pid})", name.trim())
            })
            .collect()
    }
}

/// Name and pid, if a line of debugfs `clients` describes a master: `command tgid dev master …` (drm_clients_info; a command
/// may hold spaces).
fn master_in(line: &str) -> Option<(String, u32)> {
    let words: Vec<_> = line.split_whitespace().collect();
    let at = (1..words.len().saturating_sub(2)).find(|&at| {
        words[at].parse::<u32>().is_ok() && words[at + 1].parse::<u32>().is_ok() && matches!(words[at + 2], "y" | "n")
    })?;
    (words[at + 2] == "y").then(|| Some((words[..at].join(" "), words[at].parse().ok()?)))?
}

fn has_open(pid: u32, path: &Path) -> bool {
    let fds = fs::read_dir(format!("/proc/{pid}/fd")).into_iter().flatten().flatten();
    fds.into_iter()
        .any(|entry| fs::read_link(entry.path()).is_ok_and(|target| target == path))
}

#[cfg(test)]
mod tests {
    use super::master_in;

    #[test]
    fn masters_in_debugfs() {
        assert_eq!(master_in("             command  tgid dev master a   uid      magic"), None);
        assert_eq!(
            master_in("            modetest   312   0   y    y     0          0"),
            Some(("modetest".into(), 312))
        );
        assert_eq!(master_in("  gnome shell 7  1   y    y  1000  0  5  <unset>"), Some(("gnome shell".into(), 7)));
        assert_eq!(master_in("            reader   313   0   n    y     0          0"), None);
    }
}
