//! The CRC that a display computes of each picture it shows (`Documentation/gpu/drm-uapi`, "CRC" of the DRM debugfs).

use std::fs::{self, File};
use std::io::{self, Read};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;

use nix::libc;

use super::Card;
use super::flip::wait_readable;
use crate::error::{Error, Kind, Result};

/// The CRC of one picture.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct CrcEntry {
    /// The number of the vertical blank at which the picture was shown; not every driver has it.
    pub vblank: Option<u32>,
    /// The first value.
    pub crc: u32,
}

/// A CRTC's stream of CRCs. Ends when dropped.
#[derive(Debug)]
pub(super) struct CrcStream {
    data: File,
    path: PathBuf,
}

impl CrcStream {
    /// Starts the stream of a CRTC that is active.
    ///
    /// # Errors
    /// [`Kind::Unsupported`] if the driver computes no CRC, [`Kind::Permission`] for anyone but root.
    pub(super) fn open(card: &Card, crtc_index: usize) -> Result<CrcStream> {
        let folder = card.debugfs().join(format!("crtc-{crtc_index}")).join("crc");
        let explain = |cause: io::Error| {
            let driver = &card.info().driver;
            let error = Error::from_io("read the CRCs of", card.name(), cause);
            match error.kind() {
                Kind::NotFound => error.kind_is(Kind::Unsupported).repair(format!(
                    "driver {driver} computes no CRCs, or debugfs is not mounted at /sys/kernel/debug"
                )),
                Kind::Permission => error.repair("only root may read them: run as root, or without --verify"),
                _ => error,
            }
        };
        fs::write(folder.join("control"), "auto").map_err(explain)?;
        let path = folder.join("data");
        let data = File::options()
            .read(true)
            .custom_flags(libc::O_NONBLOCK)
            .open(&path)
            .map_err(explain)?;
        Ok(CrcStream { data, path })
    }

    /// Reads away what is there: the kernel keeps 127 entries (`DRM_CRC_ENTRIES_NR`), and drops newer ones when they are not read.
    ///
    /// # Errors
    /// What `read` says.
    pub(super) fn forget(&mut self) -> Result<()> {
        let mut line = [0; 128];
        for _ in 0..128 {
            match self.data.read(&mut line) {
                Ok(_) => {}
                Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => break,
                Err(error) => return Err(Error::from_io("read", self.path.display().to_string(), error)),
            }
        }
        Ok(())
    }

    /// The next entry, waiting `timeout_ms` at most.
    ///
    /// # Errors
    /// [`Kind::Timeout`] if none came.
    pub(super) fn next(&mut self, timeout_ms: u16) -> Result<CrcEntry> {
        let subject = self.path.display().to_string();
        // One entry a read: frame number and up to ten values of 10 characters and a separator each (crtc_crc_read).
        let mut line = [0; 128];
        loop {
            match self.data.read(&mut line) {
                Ok(len) => {
                    let text = String::from_utf8_lossy(&line[..len]);
                    let bad =
                        || Error::new(Kind::System, "understand", format!("the CRC \"{}\" of {subject}", text.trim()));
                    return parse(&text).ok_or_else(bad);
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    wait_readable(&self.data, timeout_ms, "get a CRC from", &subject)?;
                }
                Err(error) => return Err(Error::from_io("read", subject, error)),
            }
        }
    }
}

impl AsFd for CrcStream {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.data.as_fd()
    }
}

/// `0x00000017 0xd4e5f601`: frame number (`XXXXXXXXXX` where the driver has none) and values.
fn parse(line: &str) -> Option<CrcEntry> {
    let mut words = line.split_whitespace();
    let number = |word: &str| u32::from_str_radix(word.strip_prefix("0x")?, 16).ok();
    let vblank = number(words.next()?);
    Some(CrcEntry { vblank, crc: number(words.next()?)? })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_parsed() {
        assert_eq!(parse("0x00000017 0xd4e5f601\n"), Some(CrcEntry { vblank: Some(23), crc: 0xd4e5_f601 }));
        assert_eq!(parse("XXXXXXXXXX 0x00000001 0x2\n"), Some(CrcEntry { vblank: None, crc: 1 }));
        assert_eq!(parse("0x00000017\n"), None);
        assert_eq!(parse(""), None);
    }
}
