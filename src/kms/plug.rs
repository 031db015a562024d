//! Whether something is still connected to where pictures go: the kernel shows pictures to an empty socket, too.
//!
//! An unplugged display's controller stays on until a program turns it off (`drm_kms_helper_hotplug_event` only tells of it): commits
//! succeed, and frames count as shown. The driver notes the change in the connector's state, which sysfs gives without a probe.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;

use super::Card;
use crate::clock::now_us;

/// The time between two looks, in µs. A look is one system call, and so a small part of one a frame.
const PERIOD_US: u64 = 1_000_000;

/// One connector's state.
#[derive(Debug)]
pub(super) struct Plug {
    connector: String,
    /// `status` of the connector in sysfs (`status_show` in drm_sysfs.c: the state that was noted last, not a new probe).
    status: File,
    connected: bool,
    looked_us: u64,
}

impl Plug {
    /// The state of a connector, `HDMI-A-1` for one; `None` where sysfs does not tell it.
    pub(super) fn new(card: &Card, connector: &str) -> Option<Plug> {
        let device = fs::canonicalize(card.sysfs()).ok()?;
        let name = device.file_name()?.to_str()?;
        let status = File::open(device.join(format!("{name}-{connector}/status"))).ok()?;
        let mut plug = Plug { connector: connector.to_owned(), status, connected: true, looked_us: now_us() };
        plug.connected = plug.look();
        Some(plug)
    }

    /// What has changed since the look before, at a time to look.
    pub(super) fn news(&mut self) -> Option<String> {
        let now = now_us();
        if now.saturating_sub(self.looked_us) < PERIOD_US {
            return None;
        }
        self.looked_us = now;
        let connected = self.look();
        if connected == std::mem::replace(&mut self.connected, connected) {
            return None;
        }
        let what = match connected {
            true => "is plugged in again",
            false => "was unplugged: frames go on, and nobody sees them",
        };
        Some(format!("{} {what}", self.connector))
    }

    /// Whether a display is there: as far as the driver knows, which says `unknown` of connectors that cannot tell.
    fn look(&self) -> bool {
        let mut text = [0; 16];
        match self.status.read_at(&mut text, 0) {
            Ok(len) => !text[..len].starts_with(b"disconnected"),
            // ENODEV: the connector is gone, or all of the card.
            Err(_) => false,
        }
    }
}
