//! One V4L2 capture node: how it is found and opened.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use nix::fcntl::{OFlag, open};
use nix::sys::stat::Mode;
use v4l::v4l_sys as sys;

use super::raw;
use crate::error::{Context, Error, Kind, Result};
use crate::node::{self, Named};

/// Which of V4L2's two capture interfaces a node has.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Api {
    /// One memory plane a buffer.
    SinglePlanar,
    /// Up to eight memory planes a buffer.
    MultiPlanar,
}

impl Api {
    pub(super) fn buffer_type(self) -> u32 {
        match self {
            Api::SinglePlanar => sys::v4l2_buf_type_V4L2_BUF_TYPE_VIDEO_CAPTURE,
            Api::MultiPlanar => sys::v4l2_buf_type_V4L2_BUF_TYPE_VIDEO_CAPTURE_MPLANE,
        }
    }
}

/// What a node says of itself.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct DeviceInfo {
    /// The node, as in `/dev/video0`.
    pub path: PathBuf,
    /// The driver's name, as in `vivid`.
    pub driver: String,
    /// The card's name, for people.
    pub card: String,
    /// Where it is attached.
    pub bus: String,
    /// Its capture interface.
    pub api: Api,
}

/// An open capture node.
#[derive(Debug)]
pub struct Device {
    fd: OwnedFd,
    info: DeviceInfo,
}

impl Device {
    /// All capture devices of this machine, by number of their nodes, and for those that cannot be opened why not. Nodes that capture
    /// no video are left out.
    pub fn list() -> Vec<Result<DeviceInfo>> {
        node::all(&nodes())
            .into_iter()
            .map(|device: Result<Device>| Ok(device?.info))
            .collect()
    }

    /// The camera that a person calls `name`: a path, a node's name (`video0`), a driver's name, or a card's name or
    /// whole words of it, whatever the case of letters.
    ///
    /// # Errors
    /// [`Kind::NotFound`], naming the cameras that are there; [`Kind::Invalid`] for an empty name, and for one that several cameras
    /// have, naming them; or what [`Device::open`] says.
    pub fn find(name: &str) -> Result<Device> {
        node::find(name, &nodes())
    }

    /// The first camera of this machine that this process may open, by number of its node.
    ///
    /// # Errors
    /// [`Kind::NotFound`] if there is none; if there are some and none may be opened, why not.
    pub fn first() -> Result<Device> {
        node::first(&nodes())
    }

    /// Opens a capture node, without blocking and close-on-exec.
    ///
    /// # Errors
    /// [`Kind::NotFound`] or [`Kind::Permission`] with the repair; [`Kind::Unsupported`] for a node that captures no video
    /// or does not stream.
    pub fn open(path: &Path) -> Result<Device> {
        let name = || path.display().to_string();
        let flags = OFlag::O_RDWR | OFlag::O_NONBLOCK | OFlag::O_CLOEXEC;
        let fd = open(path, flags, Mode::empty())
            .context("open", name)
            .map_err(|error| match error.kind() {
                Kind::NotFound => error.repair("`dmaflow list` shows the cameras that are there"),
                Kind::Permission => {
                    error.repair("members of the group that owns the node (usually `video`) may open it")
                }
                _ => error,
            })?;
        let mut capability: sys::v4l2_capability = raw::zeroed();
        raw::query_capability(fd.as_fd(), &mut capability)
            .context("ask the capabilities of", name)
            .map_err(|error| error.kind_is(Kind::Unsupported).repair("it is not a V4L2 device"))?;
        let all = capability.capabilities;
        let flags = if all & sys::V4L2_CAP_DEVICE_CAPS != 0 { capability.device_caps } else { all };
        let card = raw::text(&capability.card);
        let api = match flags {
            flags if flags & sys::V4L2_CAP_VIDEO_CAPTURE_MPLANE != 0 => Api::MultiPlanar,
            flags if flags & sys::V4L2_CAP_VIDEO_CAPTURE != 0 => Api::SinglePlanar,
            _ => {
                let error = Error::new(Kind::Unsupported, "capture from", name());
                return Err(error.because(format!("{card} is not a video capture device")));
            }
        };
        if flags & sys::V4L2_CAP_STREAMING == 0 {
            let error = Error::new(Kind::Unsupported, "capture from", name());
            return Err(error.because(format!("{card} does not stream; it only offers read()")));
        }
        let info = DeviceInfo {
            path: path.to_owned(),
            driver: raw::text(&capability.driver),
            card,
            bus: raw::text(&capability.bus_info),
            api,
        };
        Ok(Device { fd, info })
    }

    /// What the node says of itself.
    pub fn info(&self) -> &DeviceInfo {
        &self.info
    }

    /// The node's path, for messages.
    pub fn name(&self) -> String {
        self.info.path.display().to_string()
    }
}

impl Named for Device {
    const WHAT: &'static str = "a camera";
    const NONE: &'static str =
        "there is none on this machine; `modprobe vivid` makes a virtual one, the source `pattern` needs none";

    fn open(path: &Path) -> Result<Device> {
        Device::open(path)
    }

    fn names(&self) -> Vec<&str> {
        vec![&self.info.driver, &self.info.card]
    }

    fn describe(&self) -> String {
        format!("{} ({})", self.name(), self.info.driver)
    }
}

impl AsFd for Device {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

fn nodes() -> Vec<PathBuf> {
    node::numbered("/dev", "video")
}
