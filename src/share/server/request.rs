//! How a server shares: what its owner has said, and what follows from it.

use std::time::Duration;

use crate::error::{Error, Kind, Result};
use crate::share::peer::Access;
use crate::share::ring::ENTRIES;

/// How a [`Server`](super::Server) shares.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ServerRequest {
    /// Frames that a consumer may have at a time, from 1 to 15. A display that shows every frame needs three (on screen, on its way, the
    /// next), vkms four; a program that looks at one after the other, two.
    pub budget: u32,
    /// How long a consumer may keep a frame at least; counted from when it was published. `None` for three frame times (100 ms where the
    /// rate is not known).
    pub lease: Option<Duration>,
    /// The mode of the socket's file. `None` for 0600, 0660 where a `group` is given, and 0666 where other users or groups are allowed. What
    /// it says is meant: where no users or groups are allowed one by one, a mode with which all may write (0666) lets everybody connect.
    pub mode: Option<u32>,
    /// The group of the socket's file, whose processes may connect if the mode lets them write; `None` for the group that the file gets.
    pub group: Option<u32>,
    /// Users that may connect, besides the server's own.
    pub allow_uids: Vec<u32>,
    /// Consumers that [ask for it](crate::share::Receiver::connect_writable) can write into the buffers, as some importers must be able to (Mesa's
    /// lavapipe maps what it imports for writing). The others get what is for reading alone if there is such a descriptor: of a dma-buf that
    /// was also [exported so](crate::endpoint::Source::export_read_only), not of a memfd or a udmabuf. Otherwise all can read, and what they
    /// write into a [view](crate::frame::CowView) nobody else sees.
    pub writable: bool,
    /// Groups whose processes may connect: those of which it is the own group or one of the others (`SO_PEERCRED`, `SO_PEERGROUPS`).
    pub allow_gids: Vec<u32>,
}

impl Default for ServerRequest {
    /// Two frames, three frame times, for reading, this user alone.
    fn default() -> ServerRequest {
        ServerRequest {
            budget: 2,
            lease: None,
            mode: None,
            group: None,
            writable: false,
            allow_uids: Vec::new(),
            allow_gids: Vec::new(),
        }
    }
}

pub(super) fn check(request: &ServerRequest) -> Result<()> {
    let most = ENTRIES as u32 - 1;
    if (1..=most).contains(&request.budget) {
        return Ok(());
    }
    let error = Error::new(Kind::Invalid, "share", "a source");
    Err(error.because(format!("a consumer can have 1 to {most} frames, not {}", request.budget)))
}

/// Of the socket's file.
pub(super) fn mode(request: &ServerRequest) -> u32 {
    request.mode.unwrap_or(match request.group {
        _ if has_lists(request) => 0o666,
        Some(_) => 0o660,
        None => 0o600,
    })
}

/// The request of a server whose socket was passed on, for a file of this mode and group: what that says is as if it had been asked for. The
/// group of a file to which all may write is nobody's choice.
pub(super) fn passed(request: ServerRequest, mode: Option<u32>, group: Option<u32>) -> ServerRequest {
    let group = group.filter(|_| mode.is_some_and(|mode| mode & 0o022 == 0o020));
    ServerRequest { mode, group, ..request }
}

fn has_lists(request: &ServerRequest) -> bool {
    !request.allow_uids.is_empty() || !request.allow_gids.is_empty()
}

/// Who may connect to a socket whose file has this group. To connect is to write to the file (unix_find_bsd in net/unix/af_unix.c).
pub(super) fn access(request: &ServerRequest, file_group: Option<u32>) -> Access {
    let said = |bit: u32| request.mode.is_some_and(|mode| mode & bit != 0) && !has_lists(request);
    let group = request.group.is_some() && mode(request) & 0o020 != 0 || said(0o020);
    let gids = request.allow_gids.iter().copied().chain(file_group.filter(|_| group));
    Access { anybody: said(0o002), uids: request.allow_uids.clone(), gids: gids.collect() }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Who may connect to a socket that was passed on is what its file says.
    #[test]
    fn a_file_that_was_passed_on_says_who_may_connect() {
        let of = |mode: Option<u32>, uids: &[u32], gids: &[u32]| {
            let (allow_uids, allow_gids) = (uids.to_vec(), gids.to_vec());
            let request = ServerRequest { allow_uids, allow_gids, ..ServerRequest::default() };
            let group = mode.map(|_| 44);
            let Access { anybody, uids, gids } = access(&passed(request, mode, group), group);
            (anybody, uids, gids)
        };
        assert_eq!(of(Some(0o600), &[], &[]), (false, vec![], vec![]));
        assert_eq!(of(Some(0o660), &[], &[]), (false, vec![], vec![44]));
        assert_eq!(of(Some(0o666), &[], &[]), (true, vec![], vec![44]));
        assert_eq!(of(Some(0o602), &[], &[]), (true, vec![], vec![]));
        assert_eq!(of(None, &[], &[]), (false, vec![], vec![]), "no file");
        // As with --mode and --group.
        assert_eq!(of(Some(0o660), &[1000], &[27]), (false, vec![1000], vec![27, 44]));
        assert_eq!(of(Some(0o666), &[1000], &[]), (false, vec![1000], vec![]));
        assert_eq!(of(Some(0o600), &[1000], &[]), (false, vec![1000], vec![]));
    }

    /// From the socket to those who may connect.
    #[test]
    fn a_server_at_a_socket_that_was_passed_on_looks_at_its_file() {
        use std::os::fd::{AsFd, AsRawFd};
        use std::os::unix::fs::PermissionsExt;

        let path = std::env::temp_dir().join(format!("dmaflow-passed-on-{}", std::process::id()));
        let place = path.to_str().unwrap();
        let own = nix::unistd::getgid().as_raw();
        for (mode, anybody, gids) in [(0o600, false, vec![]), (0o660, false, vec![own]), (0o666, true, vec![own])] {
            let fd = crate::share::socket::open().unwrap();
            nix::sys::socket::bind(fd.as_raw_fd(), &nix::sys::socket::UnixAddr::new(place).unwrap()).unwrap();
            nix::sys::socket::listen(&fd, nix::sys::socket::Backlog::new(1).unwrap()).unwrap();
            std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode)).unwrap();
            // What a request says of files is for those that a server makes.
            let request = ServerRequest { mode: Some(0o666), group: Some(7), ..ServerRequest::default() };
            let server =
                super::super::Server::bind_inherited(fd.as_fd().try_clone_to_owned().unwrap(), request).unwrap();
            assert_eq!(server.access, Access { anybody, uids: vec![], gids }, "{mode:o}");
            std::fs::remove_file(&path).unwrap();
        }
    }

    /// What the owner has said is meant, and no more than that.
    #[test]
    fn the_mode_and_the_group_let_those_connect_whom_the_file_does() {
        let of = |mode: Option<u32>, group: Option<u32>, uids: &[u32], gids: &[u32]| {
            let lists = (uids.to_vec(), gids.to_vec());
            let request =
                ServerRequest { mode, group, allow_uids: lists.0, allow_gids: lists.1, ..ServerRequest::default() };
            // The file has the group that was said, else that of the process.
            let Access { anybody, uids, gids } = access(&request, Some(group.unwrap_or(7)));
            (super::mode(&request), anybody, uids, gids)
        };
        assert_eq!(of(None, None, &[], &[]), (0o600, false, vec![], vec![]));
        assert_eq!(of(None, Some(44), &[], &[]), (0o660, false, vec![], vec![44]));
        assert_eq!(of(Some(0o660), Some(44), &[], &[]), (0o660, false, vec![], vec![44]));
        assert_eq!(of(Some(0o600), Some(44), &[], &[]), (0o600, false, vec![], vec![]));
        assert_eq!(of(Some(0o660), None, &[], &[]), (0o660, false, vec![], vec![7]));
        assert_eq!(of(Some(0o666), None, &[], &[]), (0o666, true, vec![], vec![7]));
        // Those that are named are meant, and not all that can get at the file.
        assert_eq!(of(None, None, &[1000], &[]), (0o666, false, vec![1000], vec![]));
        assert_eq!(of(Some(0o666), None, &[], &[27]), (0o666, false, vec![], vec![27]));
        assert_eq!(of(None, Some(44), &[1000], &[27]), (0o666, false, vec![1000], vec![27, 44]));
    }
}
