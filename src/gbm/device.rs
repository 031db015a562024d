//! One DRM device's GBM: how it is found and opened.

use std::ffi::c_void;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};

use drm::Device as _;
use nix::fcntl::{OFlag, open};
use nix::sys::stat::{Mode, fstat, major, minor, stat};

use super::library::Functions;
use super::raw::RawDevice;
use crate::error::{Context, Error, Kind, Result};
use crate::format::Format;
use crate::node::{self, Named};

/// What a device says of itself.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct DeviceInfo {
    /// The node, as in `/dev/dri/renderD128`.
    pub path: PathBuf,
    /// The kernel driver's name, as in `amdgpu`.
    pub driver: String,
    /// What of libgbm works it, as in `drm` (Mesa's).
    pub backend: String,
}

/// The GBM of one DRM device. Clones are cheap and share it; what it made keeps it.
#[derive(Clone, Debug)]
pub struct Device(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    raw: Arc<RawDevice>,
    info: DeviceInfo,
    /// The device in sysfs, which all its nodes have in common.
    sysfs: Option<PathBuf>,
    formats: OnceLock<Option<Vec<Format>>>,
}

/// A descriptor of which the driver is asked.
struct Node<'a>(BorrowedFd<'a>);

impl AsFd for Node<'_> {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0
    }
}

impl drm::Device for Node<'_> {}

impl Device {
    /// Every device with GBM, and for those that cannot be opened why not: render nodes, then cards.
    pub fn list() -> Vec<Result<Device>> {
        match Functions::load() {
            Ok(_) => node::all(&nodes()),
            Err(error) => vec![Err(error)],
        }
    }

    /// The device that a person calls `name`: a path, a node's name (`renderD128`), or a driver's. Of a driver's device, the first node
    /// through which buffers can be made, its render node before its card: Mesa's software renderer makes none through a render node (the
    /// kernel's dumb buffers are a card's).
    ///
    /// # Errors
    /// [`Kind::NotFound`], naming the devices that are there; [`Kind::Invalid`] if the driver has several; or what [`Device::open`] says.
    pub fn find(name: &str) -> Result<Device> {
        // Said of itself, and not as the reason of a node's.
        Functions::load()?;
        let found: Device = node::find(name, &nodes())?;
        if name.contains('/') || found.info().path.ends_with(name) || found.makes_buffers() {
            return Ok(found);
        }
        let others = nodes().into_iter().filter(|node| *node != found.info().path);
        let others = others.filter(|node| found.0.sysfs.is_some() && sysfs_of_node(node) == found.0.sysfs);
        let maker = others.filter_map(|node| Device::open(&node).ok()).find(Device::makes_buffers);
        Ok(maker.unwrap_or(found))
    }

    /// The GBM of the device that this card's node belongs to, to make buffers: through its render node where it has one and that makes
    /// some, else through the card's own. A card that somebody drives refuses drivers' own calls to all others but root (DRM_AUTH in
    /// `drm_ioctl_permit`, drm_ioctl.c), and a render node does not.
    ///
    /// # Errors
    /// As [`Device::open`] of the card's node.
    pub fn of_card(card: &Path) -> Result<Device> {
        let device = sysfs_of_node(card);
        let renders = node::numbered(FOLDER, RENDER).into_iter();
        let renders = renders.filter(|node| device.is_some() && sysfs_of_node(node) == device);
        let maker = renders.filter_map(|node| Device::open(&node).ok()).find(Device::makes_buffers);
        maker.map_or_else(|| Device::open(card), Ok)
    }

    /// Whether the device that this card's node belongs to renders itself. GBM of one that does not is Mesa's software renderer, or another
    /// device's driver (`kmsro`), over the same dumb buffers that the card makes by itself. A look into sysfs; libgbm is not loaded.
    pub fn renders(card: &Path) -> bool {
        let device = sysfs_of_node(card);
        let mut renders = node::numbered(FOLDER, RENDER).into_iter();
        device.is_some() && renders.any(|node| sysfs_of_node(&node) == device)
    }

    /// The first device through which buffers can be made; where there is none, the first that imports.
    ///
    /// # Errors
    /// [`Kind::NotFound`] if there is none; if there are some and none can be opened, why not.
    pub fn first() -> Result<Device> {
        // Said of itself, and not as the reason of a node's.
        Functions::load()?;
        let mut first = None;
        for device in node::all::<Device>(&nodes()).into_iter().filter_map(Result::ok) {
            if device.makes_buffers() {
                return Ok(device);
            }
            first = first.or(Some(device));
        }
        first.map_or_else(|| node::first(&nodes()), Ok)
    }

    /// Opens a node, close-on-exec: a file of GBM's own, whoever else has the node open. Does not keep a display's card from being driven.
    ///
    /// # Errors
    /// [`Kind::NotFound`] or [`Kind::Permission`] with the repair; as [`Device::from_fd`] otherwise.
    pub fn open(path: &Path) -> Result<Device> {
        let fd = open_node(path)?;
        Device::with_path(fd, path.to_owned())
    }

    /// Takes over a descriptor. No other descriptor may share its open file (a `dup` does): GBM closes GEM handles of that file.
    ///
    /// # Errors
    /// [`Kind::Unsupported`] for what is no DRM device, and where libgbm is not installed; [`Kind::System`] where it has nothing for the
    /// driver.
    pub fn from_fd(fd: OwnedFd) -> Result<Device> {
        let path = std::fs::read_link(format!("/proc/self/fd/{}", fd.as_raw_fd()));
        let path = path.context("find the name of", || format!("descriptor {}", fd.as_raw_fd()))?;
        Device::with_path(fd, path)
    }

    fn with_path(fd: OwnedFd, path: PathBuf) -> Result<Device> {
        let name = path.display().to_string();
        // GBM takes any descriptor at all for a device, and fails later or not at all.
        let driver = Node(fd.as_fd()).get_driver().context("ask the driver of", || name.clone());
        let driver = driver.map_err(|error| error.kind_is(Kind::Unsupported).repair("it is not a DRM device"))?;
        let driver = driver.name().to_string_lossy().into_owned();
        let raw = RawDevice::new(Functions::load()?, fd).map_err(|cause| {
            let error = Error::new(Kind::System, "use GBM of", &name).said_by("gbm_create_device");
            let error = match cause.raw_os_error() {
                Some(0) | None => error.because(format!("libgbm has nothing for its driver {driver}")),
                Some(_) => error.because(cause),
            };
            error.repair("install the driver's user-space part: libgl1-mesa-dri on Debian and Ubuntu, the vendor's own for others")
        })?;
        let raw = Arc::new(raw);
        let info = DeviceInfo { path, driver, backend: raw.backend() };
        let sysfs = fstat(raw.as_fd()).ok().and_then(|stat| sysfs(stat.st_rdev));
        Ok(Device(Arc::new(Inner { raw, info, sysfs, formats: OnceLock::new() })))
    }

    /// What the device says of itself.
    pub fn info(&self) -> &DeviceInfo {
        &self.0.info
    }

    /// The node's path, for messages.
    pub fn name(&self) -> String {
        self.info().path.display().to_string()
    }

    /// The formats that it imports, best first, each tried: a small buffer is imported in every format that is known. `None` where there
    /// was no memory to try with that it takes. Cost: some hundred system calls the first time, none later.
    pub fn formats(&self) -> Option<&[Format]> {
        self.0.formats.get_or_init(|| self.try_formats()).as_deref()
    }

    /// The device as GBM's C interface has it (`struct gbm_device *`), for `eglGetPlatformDisplay` and the like. It lives as long as this
    /// handle, its clones, and what they made. libgbm promises nothing about threads: what others do with it must not run beside calls of
    /// this device.
    pub fn as_ptr(&self) -> *mut c_void {
        self.0.raw.as_ptr()
    }

    pub(super) fn raw(&self) -> &Arc<RawDevice> {
        &self.0.raw
    }

    /// The device's node once more, as a file of its own with GEM handles of its own.
    ///
    /// # Errors
    /// As opening says.
    pub(super) fn reopen(&self) -> Result<OwnedFd> {
        open_node(Path::new(&format!("/proc/self/fd/{}", self.0.raw.as_fd().as_raw_fd())))
    }
}

fn open_node(path: &Path) -> Result<OwnedFd> {
    let flags = OFlag::O_RDWR | OFlag::O_CLOEXEC;
    let opened = open(path, flags, Mode::empty()).context("open", || path.display().to_string());
    let fd = opened.map_err(|error| match error.kind() {
        Kind::NotFound => error.repair("`dmaflow list` shows the devices that are there"),
        Kind::Permission => {
            error.repair("members of the group that owns the node (usually `render`, or `video`) may open it")
        }
        _ => error,
    })?;
    // The first to open a card is its master without asking (drm_master_open), and in the way of one who wants to drive it. Not being
    // master is the aim, so a refusal for that reason is no failure.
    let _ = Node(fd.as_fd()).release_master_lock();
    Ok(fd)
}

impl Named for Device {
    const WHAT: &'static str = "a device with GBM";
    const NONE: &'static str = "there is none on this machine; `modprobe vgem` makes a virtual one";

    fn open(path: &Path) -> Result<Device> {
        Device::open(path)
    }

    fn names(&self) -> Vec<&str> {
        vec![&self.info().driver]
    }

    fn describe(&self) -> String {
        format!("{} ({})", self.name(), self.info().driver)
    }

    fn is_same(&self, other: &Device) -> bool {
        self.0.sysfs.is_some() && self.0.sysfs == other.0.sysfs
    }
}

const FOLDER: &str = "/dev/dri";
const RENDER: &str = "renderD";

/// Render nodes first: who may not drive displays may open them.
fn nodes() -> Vec<PathBuf> {
    let mut nodes = node::numbered(FOLDER, RENDER);
    nodes.extend(node::numbered(FOLDER, "card"));
    nodes
}

/// The device of a node in sysfs; its card and its render node have the same (`drm_sysfs_minor_alloc` makes it the parent of both).
fn sysfs(node: nix::libc::dev_t) -> Option<PathBuf> {
    std::fs::canonicalize(format!("/sys/dev/char/{}:{}/device", major(node), minor(node))).ok()
}

fn sysfs_of_node(path: &Path) -> Option<PathBuf> {
    sysfs(stat(path).ok()?.st_rdev)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// GBM itself would take it; whether libgbm is installed does not matter.
    #[test]
    fn what_is_no_drm_device_is_refused() {
        let error = Device::open(Path::new("/dev/null")).unwrap_err();
        assert_eq!((error.kind(), error.known_repair()), (Kind::Unsupported, Some("it is not a DRM device")));
        let (pipe, _end) = nix::unistd::pipe().unwrap();
        let error = Device::from_fd(pipe).unwrap_err();
        assert_eq!(error.kind(), Kind::Unsupported);
        assert!(error.subject().contains("pipe:"), "{}", error.line());
    }

    #[test]
    fn what_is_not_there_is_said_to_be_missing() {
        assert_eq!(Device::open(Path::new("/dev/dri/renderD999")).unwrap_err().kind(), Kind::NotFound);
    }
}
