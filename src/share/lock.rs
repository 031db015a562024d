//! The file beside a server's socket that is locked while the server lives: `PATH.lock`.
//!
//! A socket's file stays when its server is killed, so the next one takes it away. Two that start at the same time would take away each
//! other's, though the other listens by now: whoever has the lock is the only one that may. The kernel lets go of it when its owner is
//! gone, however that went. It is a lock of the open file (`F_OFD_SETLK`, fcntl(2)): others can ask whether somebody has it
//! ([`is_held`]) and do not get it meanwhile themselves, as with flock(2).

use std::ffi::OsString;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, fcntl};
use nix::libc;

/// Held by a server. The file goes with it.
#[derive(Debug)]
pub(super) struct Lock {
    file: File,
    path: PathBuf,
}

fn beside(socket: &Path) -> PathBuf {
    let mut name = OsString::from(socket);
    name.push(".lock");
    name.into()
}

fn whole_file() -> libc::flock {
    // The values of the three constants fit: 0 and 1.
    let (kind, whence) = (libc::F_WRLCK as libc::c_short, libc::SEEK_SET as libc::c_short);
    libc::flock { l_type: kind, l_whence: whence, l_start: 0, l_len: 0, l_pid: 0 }
}

/// The file, whoever has made it. Made anew only where it is not there: with `O_CREAT` alone, another user's in a folder that all may write
/// to is refused (`fs.protected_regular`).
fn open(path: &Path) -> io::Result<File> {
    let flags = libc::O_NOFOLLOW | libc::O_NONBLOCK;
    for _ in 0..8 {
        match OpenOptions::new().read(true).write(true).custom_flags(flags).open(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            other => return other,
        }
        let mut new = OpenOptions::new();
        match new
            .read(true)
            .write(true)
            .create_new(true)
            .mode(0o600)
            .custom_flags(flags)
            .open(path)
        {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            other => return other,
        }
    }
    Err(Errno::EAGAIN.into())
}

impl Lock {
    /// The lock of the socket at `socket`; `None` if another server has it.
    ///
    /// # Errors
    /// What the system says of the file.
    pub(super) fn take(socket: &Path) -> io::Result<Option<Lock>> {
        let path = beside(socket);
        for _ in 0..8 {
            let file = open(&path)?;
            match fcntl(&file, FcntlArg::F_OFD_SETLK(&whole_file())) {
                Err(Errno::EAGAIN | Errno::EACCES) => return Ok(None),
                other => other?,
            };
            // Whoever had it before has removed the file perhaps, after it was opened here: then the next one makes and locks another.
            let ours = file.metadata()?;
            let same = |there: fs::Metadata| (there.dev(), there.ino()) == (ours.dev(), ours.ino());
            if fs::symlink_metadata(&path).is_ok_and(same) {
                return Ok(Some(Lock { file, path }));
            }
        }
        Err(Errno::EAGAIN.into())
    }
}

impl Drop for Lock {
    fn drop(&mut self) {
        let ours = self.file.metadata().map(|ours| (ours.dev(), ours.ino())).ok();
        let there = fs::symlink_metadata(&self.path).map(|there| (there.dev(), there.ino())).ok();
        if ours.is_some() && ours == there {
            // A file that stays is locked by nobody, and the next server takes it as it is.
            let _ = fs::remove_file(&self.path);
        }
    }
}

/// Whether the server of the socket at `socket` lives. No lock is taken; a file that cannot be read says nothing.
pub(super) fn is_held(socket: &Path) -> bool {
    let flags = libc::O_NOFOLLOW | libc::O_NONBLOCK;
    let Ok(file) = OpenOptions::new().read(true).custom_flags(flags).open(beside(socket)) else { return false };
    let mut lock = whole_file();
    fcntl(&file, FcntlArg::F_OFD_GETLK(&mut lock)).is_ok() && i32::from(lock.l_type) != libc::F_UNLCK
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_has_it_at_a_time_and_others_can_see_that() {
        let path = std::env::temp_dir().join(format!("dmaflow-lock-{}", std::process::id()));
        assert!(!is_held(&path));
        let lock = Lock::take(&path).unwrap().unwrap();
        assert!(is_held(&path) && is_held(&path), "to ask is not to take");
        assert!(Lock::take(&path).unwrap().is_none());
        drop(lock);
        assert!(!is_held(&path) && !beside(&path).exists());
        // One that was killed leaves the file.
        fs::write(beside(&path), "").unwrap();
        let lock = Lock::take(&path).unwrap().unwrap();
        // Somebody has put another in its place: that one stays.
        fs::remove_file(beside(&path)).unwrap();
        fs::write(beside(&path), "").unwrap();
        drop(lock);
        assert!(beside(&path).exists());
        fs::remove_file(beside(&path)).unwrap();
    }

    /// However it goes between those that come and those that leave, never do two have it.
    #[test]
    fn many_that_come_and_go() {
        use std::sync::atomic::{AtomicU32, Ordering};
        let path = std::env::temp_dir().join(format!("dmaflow-locks-{}", std::process::id()));
        let (inside, taken) = (AtomicU32::new(0), AtomicU32::new(0));
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for _ in 0..500 {
                        // It came and went too often to be had: as good as another's.
                        let Some(lock) = Lock::take(&path).ok().flatten() else { continue };
                        assert_eq!(inside.fetch_add(1, Ordering::SeqCst), 0);
                        taken.fetch_add(1, Ordering::SeqCst);
                        inside.fetch_sub(1, Ordering::SeqCst);
                        drop(lock);
                    }
                });
            }
        });
        assert!(taken.into_inner() >= 4 && !beside(&path).exists());
    }
}
