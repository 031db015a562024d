//! What this user's processes share, as `dmaflow list` shows it.
//!
//! A server is asked by connecting to it. A socket behind which a service manager waits would start its service, and switch the camera on, so
//! only those are asked whose server says that it lives.

use std::fs::DirBuilder;
use std::io;
use std::os::unix::fs::{DirBuilderExt, FileTypeExt};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use dmaflow::endpoint::Source;
use dmaflow::share::{Receiver, Server};
use serde::Serialize;

/// How long all of them may take to answer.
const ANSWER: Duration = Duration::from_secs(1);

/// A source that another process shares.
#[derive(Serialize, Default)]
pub struct ShareListing {
    /// As `--from` takes it.
    pub name: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    source: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    layout: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    fps: Option<f64>,
    /// Why nobody was asked what it is; it may well be used.
    #[serde(skip_serializing_if = "Option::is_none")]
    not_asked: Option<String>,
    /// Why it cannot be used.
    #[serde(skip_serializing_if = "Option::is_none")]
    why_not: Option<String>,
}

impl ShareListing {
    /// What the table says of it.
    pub fn state(&self) -> String {
        let fps = self.fps.map_or(String::new(), |fps| format!(" at {fps:.1} fps"));
        match (&self.source, &self.layout) {
            (Some(source), Some(layout)) => format!("{}: {layout}{fps}", crate::table::plain(source)),
            _ => self.not_asked.as_ref().or(self.why_not.as_ref()).cloned().unwrap_or_default(),
        }
    }
}

/// Where the sockets of this user's shares lie, if the session has such a place.
pub fn folder() -> Option<PathBuf> {
    let runtime = std::env::var_os("XDG_RUNTIME_DIR").filter(|folder| !folder.is_empty())?;
    Some(Path::new(&runtime).join("dmaflow"))
}

/// Makes the [folder] for this user alone, if a socket at `at` would be in it and it is missing.
///
/// # Errors
/// What `mkdir` says.
pub fn make_folder_for(at: &str) -> io::Result<()> {
    let Some(folder) = folder().filter(|folder| Path::new(at).parent() == Some(folder)) else { return Ok(()) };
    match DirBuilder::new().mode(0o700).create(folder) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        made => made,
    }
}

/// The shares whose sockets lie where this user's do. Those that live are connected to for a moment, all at once.
pub fn shares() -> Vec<ShareListing> {
    let Some(Ok(entries)) = folder().map(std::fs::read_dir) else { return Vec::new() };
    let socket = |entry: std::fs::DirEntry| entry.file_type().is_ok_and(|kind| kind.is_socket()).then(|| entry.path());
    let mut paths: Vec<PathBuf> = entries.flatten().filter_map(socket).collect();
    paths.sort_unstable();
    let listening = std::fs::read_to_string("/proc/net/unix").unwrap_or_default();
    thread::scope(|scope| {
        let asked: Vec<_> = paths.iter().map(|path| scope.spawn(|| listing(path, &listening))).collect();
        asked.into_iter().filter_map(|asked| asked.join().ok()).collect()
    })
}

fn listing(path: &Path, listening: &str) -> ShareListing {
    let place = path.display().to_string();
    let name = format!("unix:{place}");
    if !Server::lives_at(path) && listens(listening, &place) {
        let why = "not asked: it may be a service that starts, with its camera, when somebody connects";
        return ShareListing { name, not_asked: Some(why.to_owned()), ..ShareListing::default() };
    }
    // Where nobody listens, this says so at once.
    match Receiver::connect_within(&place, "dmaflow list", ANSWER) {
        Ok(receiver) => ShareListing {
            name,
            source: Some(receiver.source().to_owned()),
            layout: Some(receiver.layout().to_string()),
            fps: receiver.rate(),
            ..ShareListing::default()
        },
        Err(error) => ShareListing { name, why_not: Some(error.line()), ..ShareListing::default() },
    }
}

/// Whether somebody listens at a path, by what /proc/net/unix says: of each socket number, count, protocol, flags, type, state, inode and
/// path (unix_seq_show in net/unix/af_unix.c). Of the flags, 0x10000 (`__SO_ACCEPTCON`) is set for those that listen.
fn listens(table: &str, path: &str) -> bool {
    table.lines().any(|line| {
        let mut fields = line.split_ascii_whitespace();
        let flags = fields.nth(3).and_then(|flags| u32::from_str_radix(flags, 16).ok());
        // A path may have spaces in it.
        flags.is_some_and(|flags| flags & 0x1_0000 != 0) && line.ends_with(&format!(" {path}"))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_listens_is_known_without_connecting() {
        let table = "Num       RefCount Protocol Flags    Type St Inode Path\n\
            0000000000000000: 00000002 00000000 00010000 0005 01 11047 /run/user/1000/dmaflow/camera.sock\n\
            0000000000000000: 00000003 00000000 00000000 0005 03 11048 /run/user/1000/dmaflow/other.sock\n";
        let listens = |name: &str| listens(table, &format!("/run/user/1000/dmaflow/{name}"));
        assert!(listens("camera.sock") && !listens("other.sock") && !listens("camera"));
        assert!(!super::listens(table, "camera.sock"));
        let path = std::env::temp_dir().join(format!("dmaflow-listens-{}", std::process::id()));
        let _listener = std::os::unix::net::UnixListener::bind(&path).unwrap();
        let table = std::fs::read_to_string("/proc/net/unix").unwrap();
        assert!(super::listens(&table, &path.display().to_string()));
        std::fs::remove_file(&path).unwrap();
    }
}
