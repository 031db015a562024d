//! One DRM device with modesetting: how it is found and opened, and the properties of its objects.

use std::collections::HashMap;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use drm::control::{self, Device as _};
use drm::{ClientCapability, Device as _, DriverCapability};
use nix::fcntl::{OFlag, open};
use nix::sys::stat::{Mode, fstat, minor};

use super::gem::GemTable;
use crate::error::{Context, Error, Kind, Result};
use crate::node::{self, Named};

/// What a card says of itself.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct CardInfo {
    /// The node, as in `/dev/dri/card0`.
    pub path: PathBuf,
    /// The driver's name, as in `vkms`.
    pub driver: String,
    /// The driver's words about itself.
    pub description: String,
    /// The driver's version: major, minor, patch level.
    pub version: (i32, i32, i32),
}

/// An open DRM device that can set modes atomically.
#[derive(Debug)]
pub struct Card {
    fd: OwnedFd,
    info: CardInfo,
    minor: u64,
    /// Property names by number: they are the same for all objects and never change.
    names: Mutex<HashMap<u32, String>>,
    pub(super) gem: GemTable,
}

/// The properties of one object: name to number and value.
pub(super) type Properties = HashMap<String, (u32, u64)>;

impl AsFd for Card {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl drm::Device for Card {}
impl control::Device for Card {}

impl Card {
    /// All cards that can set modes atomically, by number of their nodes, and for those that cannot be opened why not. Cards without
    /// displays, or without atomic modesetting, are left out.
    pub fn list() -> Vec<Result<CardInfo>> {
        node::all(&nodes())
            .into_iter()
            .map(|device: Result<Card>| Ok(device?.info))
            .collect()
    }

    /// The card that a person calls `name`: a path, a driver's name, or a node's name (`card0`).
    ///
    /// # Errors
    /// [`Kind::NotFound`], naming the cards that are there, or what [`Card::open`] says.
    pub fn find(name: &str) -> Result<Card> {
        node::find(name, &nodes())
    }

    /// The first card of this machine that this process may open, by number of its node.
    ///
    /// # Errors
    /// [`Kind::NotFound`] if there is none; if there are some and none may be opened, why not.
    pub fn first() -> Result<Card> {
        node::first(&nodes())
    }

    /// Opens a card, close-on-exec and without blocking reads. Does not keep it from another process that wants to drive it.
    ///
    /// # Errors
    /// [`Kind::NotFound`] or [`Kind::Permission`] with the repair; [`Kind::Unsupported`] for a node that is no DRM device, has
    /// no display hardware, cannot set modes atomically, or cannot import dma-bufs.
    pub fn open(path: &Path) -> Result<Card> {
        let name = || path.display().to_string();
        let flags = OFlag::O_RDWR | OFlag::O_NONBLOCK | OFlag::O_CLOEXEC;
        let fd = open(path, flags, Mode::empty())
            .context("open", name)
            .map_err(|error| match error.kind() {
                Kind::NotFound => error.repair("`dmaflow list` shows the displays that are there"),
                Kind::Permission => {
                    error.repair("members of the group that owns the node (usually `video`) may open it")
                }
                _ => error,
            })?;
        let stat = fstat(&fd).context("identify", name)?;
        let info =
            CardInfo { path: path.to_owned(), driver: String::new(), description: String::new(), version: (0, 0, 0) };
        let mut card = Card { fd, info, minor: minor(stat.st_rdev), names: Mutex::default(), gem: GemTable::default() };
        // The first to open a card is its master without asking (drm_master_open), and in the way of one who wants to be.
        card.give_up_master();
        let driver = card.get_driver().context("ask the driver of", name);
        let driver = driver.map_err(|error| error.kind_is(Kind::Unsupported).repair("it is not a DRM device"))?;
        card.info.driver = driver.name().to_string_lossy().into_owned();
        card.info.description = driver.description().to_string_lossy().into_owned();
        card.info.version = driver.version;
        let driver = card.info.driver.clone();
        let lacks = |what: &str, repair: &str| {
            let error =
                Error::new(Kind::Unsupported, "display on", name()).because(format!("its driver {driver} {what}"));
            if repair.is_empty() { error } else { error.repair(repair) }
        };
        let resources = card
            .resource_handles()
            .map_err(|_| lacks("sets no modes", "it is a GPU or a test device without outputs"))?;
        if resources.crtcs().is_empty() {
            return Err(lacks("has no display controller", ""));
        }
        for capability in [ClientCapability::UniversalPlanes, ClientCapability::Atomic] {
            let set = card.set_client_capability(capability, true);
            set.map_err(|_| {
                lacks("has no atomic modesetting", "dmaflow needs it to know when a frame has left the screen")
            })?;
        }
        // DRM_PRIME_CAP_IMPORT is 1 (drm.h).
        if card
            .get_driver_capability(DriverCapability::Prime)
            .is_ok_and(|capability| capability & 1 == 0)
        {
            return Err(lacks("cannot import dma-bufs", ""));
        }
        Ok(card)
    }

    /// What the card says of itself.
    pub fn info(&self) -> &CardInfo {
        &self.info
    }

    /// The node's path, for messages.
    pub fn name(&self) -> String {
        self.info.path.display().to_string()
    }

    /// The card's folder in debugfs (`/sys/kernel/debug/dri/N`, N being the node's minor number), readable by root.
    pub(super) fn debugfs(&self) -> PathBuf {
        PathBuf::from(format!("/sys/kernel/debug/dri/{}", self.minor))
    }

    /// Whether its device has been taken away while it was open.
    ///
    /// The kernel removes the node's entry when the device is unregistered (`drm_dev_unregister`, `drm_minor_unregister` in drm_drv.c),
    /// and gives the number to no other device while the node is open (`drm_minor_alloc_release` frees it with the last reference).
    pub(super) fn is_gone(&self) -> bool {
        let sysfs = self.sysfs();
        // Without sysfs nothing is known.
        sysfs.parent().is_some_and(Path::exists) && !sysfs.exists()
    }

    /// The card in sysfs, by the major number of DRM nodes (DRM_MAJOR in drm.h).
    pub(super) fn sysfs(&self) -> PathBuf {
        PathBuf::from(format!("/sys/dev/char/226:{}", self.minor))
    }

    /// All properties of an object. `kind` is a `DRM_MODE_OBJECT_*`.
    pub(super) fn properties(&self, object: u32, kind: u32) -> Result<Properties> {
        let about = || format!("object {object} of {}", self.name());
        let (mut ids, mut values) = (Vec::new(), Vec::new());
        drm_ffi::mode::get_properties(self.as_fd(), object, kind, Some(&mut ids), Some(&mut values))
            .context("read the properties of", about)?;
        let mut properties = Properties::with_capacity(ids.len());
        for (&id, &value) in ids.iter().zip(&values) {
            properties.insert(self.property_name(id)?, (id, value));
        }
        Ok(properties)
    }

    fn property_name(&self, id: u32) -> Result<String> {
        let mut names = self.names.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        if let Some(name) = names.get(&id) {
            return Ok(name.clone());
        }
        // Both lists are asked for: without them drm-ffi passes the kernel their lengths with null pointers.
        let property = drm_ffi::mode::get_property(self.as_fd(), id, Some(&mut vec![]), Some(&mut vec![]));
        let property = property.context("read a property of", || self.name())?;
        let bytes: Vec<u8> = property
            .name
            .iter()
            .map(|&c| c.cast_unsigned())
            .take_while(|&c| c != 0)
            .collect();
        let name = String::from_utf8_lossy(&bytes).into_owned();
        names.insert(id, name.clone());
        Ok(name)
    }

    /// The number that an enumeration property gives to one of its names.
    pub(super) fn enum_value(&self, property: u32, name: &str) -> Option<u64> {
        let mut enums = Vec::new();
        drm_ffi::mode::get_property(self.as_fd(), property, Some(&mut vec![]), Some(&mut enums)).ok()?;
        let matches = |entry: &&drm_ffi::drm_mode_property_enum| {
            let text: Vec<u8> = entry.name.iter().map(|&c| c.cast_unsigned()).take_while(|&c| c != 0).collect();
            text == name.as_bytes()
        };
        enums.iter().find(matches).map(|entry| entry.value)
    }
}

impl Named for Card {
    const WHAT: &'static str = "a display";
    const NONE: &'static str =
        "there is none on this machine; `modprobe vkms` makes a virtual one, the sink `null` needs none";

    fn open(path: &Path) -> Result<Card> {
        Card::open(path)
    }

    fn names(&self) -> Vec<&str> {
        vec![&self.info.driver]
    }

    fn describe(&self) -> String {
        format!("{} ({})", self.name(), self.info.driver)
    }
}

fn nodes() -> Vec<PathBuf> {
    node::numbered("/dev/dri", "card")
}
