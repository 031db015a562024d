//! The devices that the tests use: vivid's parameters and controls, vkms's state in debugfs.

use std::fs;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::PathBuf;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};
use drm::Device as _;

use crate::process::sh;

/// How the machine comes up.
const DEFAULT: &[&str] = &["multiplanar=1", "allocators=0"];

/// A new timeline each time that it is opened; see [`Timeline`](crate::sw_sync::Timeline).
pub const SW_SYNC: &str = "/sys/kernel/debug/sync/sw_sync";

/// Whether a module is loaded, a program is there, or this process is root.
pub fn has(what: &str) -> bool {
    match what {
        "vivid" | "vkms" | "vgem" => fs::metadata(format!("/sys/module/{what}")).is_ok() && is_root(),
        // A device for the driver virtio_gpu, which a test loads when it needs it.
        "virtio-gpu" => has_virtio_gpu() && is_root(),
        "root" => is_root(),
        "sw_sync" => fs::metadata(SW_SYNC).is_ok() && is_root(),
        "udmabuf" => fs::metadata("/dev/udmabuf").is_ok(),
        program => {
            let path = std::env::var("PATH").unwrap_or_default();
            path.split(':')
                .any(|folder| fs::metadata(format!("{folder}/{program}")).is_ok())
        }
    }
}

fn is_root() -> bool {
    nix::unistd::geteuid().is_root()
}

/// Major and minor number of the kernel.
pub fn kernel() -> (u32, u32) {
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let mut numbers = release.split(['.', '-']).map_while(|number| number.trim().parse().ok());
    (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0))
}

/// Loads vivid anew with these parameters; what is not named stays as the machine comes up. The harness puts it back.
pub fn vivid(parameters: &[&str]) -> Result<()> {
    let mut all: Vec<&str> = vec!["n_devs=1"];
    let named = |name: &str| parameters.iter().any(|parameter| parameter.split('=').next() == Some(name));
    for parameter in ["node_types=0x1"].iter().chain(DEFAULT) {
        if !named(parameter.split('=').next().unwrap_or_default()) {
            all.push(parameter);
        }
    }
    all.extend(parameters);
    sh(&format!("modprobe -r vivid && modprobe vivid {}", all.join(" ")))?;
    ensure!(fs::metadata("/dev/video0").is_ok(), "vivid made no /dev/video0");
    Ok(())
}

pub fn reload() -> Result<()> {
    vivid(&[])
}

/// vkms as the kernel's source has it, in place of the corrected one that the machine comes up with.
pub struct StockVkms(());

impl StockVkms {
    pub fn load() -> Result<StockVkms> {
        let stock = StockVkms(());
        // rmmod leaves the modules that vkms needs where they are.
        sh("rmmod vkms && insmod /usr/lib/dmaflow-vm/$(uname -r)/vkms.ko enable_writeback=1 enable_overlay=1")?;
        Ok(stock)
    }

    /// Puts the other back. Dropping does so too, and cannot tell of a failure.
    pub fn unload(self) -> Result<()> {
        std::mem::forget(self);
        StockVkms::put_back()
    }

    fn put_back() -> Result<()> {
        sh("modprobe -r vkms; modprobe vkms enable_writeback=1 enable_overlay=1").map(drop)
    }
}

impl Drop for StockVkms {
    fn drop(&mut self) {
        let _ = StockVkms::put_back();
    }
}

/// By the number that virtio gives to GPUs (`VIRTIO_ID_GPU` in linux/virtio_ids.h).
fn has_virtio_gpu() -> bool {
    let devices = fs::read_dir("/sys/bus/virtio/devices").into_iter().flatten().flatten();
    let id = |device: &fs::DirEntry| fs::read_to_string(device.path().join("device")).unwrap_or_default();
    devices.into_iter().any(|device| id(&device).trim() == "0x0010")
}

/// The driver of the virtual machine's second display adapter, whose syncobjs are DRM's own; loaded as long as this lives.
pub struct VirtioGpu(());

impl VirtioGpu {
    pub fn load() -> Result<VirtioGpu> {
        let loaded = VirtioGpu(());
        sh("modprobe virtio_gpu")?;
        Ok(loaded)
    }

    /// Dropping does so too, and cannot tell of a failure.
    pub fn unload(self) -> Result<()> {
        std::mem::forget(self);
        sh("modprobe -r virtio_gpu").map(drop)
    }
}

impl Drop for VirtioGpu {
    fn drop(&mut self) {
        let _ = sh("modprobe -r virtio_gpu");
    }
}

/// Puts vivid's parameters, input, format, rate and controls to what they are after loading.
pub fn reset() -> Result<()> {
    if !has("vivid") {
        return Ok(());
    }
    let first = |name: &str| {
        let value = fs::read_to_string(format!("/sys/module/vivid/parameters/{name}")).unwrap_or_default();
        value.trim().split(',').next().unwrap_or_default().to_owned()
    };
    let node_types = first("node_types");
    let as_loaded = first("multiplanar") == "1" && first("allocators") == "0" && node_types == "1";
    if !as_loaded {
        return reload();
    }
    let reset = sh("v4l2-ctl -d /dev/video0 -i 0 -v width=640,height=360,pixelformat=YUYV -p 60 \
         -c percentage_of_dropped_buffers=0,wrap_sequence_number=0,wrap_timestamp=0,standard_signal_mode=0");
    // A test that left a fault injected, or the queue in use, shows here: a fresh module is the cure.
    if reset.is_err() { reload() } else { Ok(()) }
}

/// Sets a control from outside, as another program would.
pub fn control(setting: &str) -> Result<()> {
    sh(&format!("v4l2-ctl -d /dev/video0 -c {setting}")).map(drop)
}

/// The folder of vkms in debugfs.
pub fn debugfs() -> Option<PathBuf> {
    let entries = fs::read_dir("/sys/kernel/debug/dri").into_iter().flatten().flatten();
    let mut folders: Vec<_> = entries.map(|entry| entry.path()).collect();
    folders.sort();
    folders.into_iter().find(|folder| {
        fs::read_to_string(folder.join("name")).is_ok_and(|name| name.starts_with("vkms "))
            && folder.join("state").exists()
    })
}

/// The node of vkms.
pub fn card() -> Result<PathBuf> {
    let cards = fs::read_dir("/sys/class/drm")?.flatten();
    let is_vkms = |card: &PathBuf| {
        fs::read_link(card.join("device")).is_ok_and(|device| device.ends_with("vkms"))
            && card.file_name().is_some_and(|name| !name.to_string_lossy().contains('-'))
    };
    let card = cards.map(|entry| entry.path()).find(is_vkms).context("vkms has no card")?;
    Ok(PathBuf::from("/dev/dri").join(card.file_name().unwrap_or_default()))
}

/// The file that tells and forces whether something is connected to vkms.
pub fn connector() -> Result<PathBuf> {
    let name = card()?.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let path = PathBuf::from(format!("/sys/class/drm/{name}-Virtual-1/status"));
    ensure!(path.exists(), "{} is not there", path.display());
    Ok(path)
}

/// The atomic state of vkms and its framebuffers, without what differs from commit to commit.
pub fn screen() -> String {
    let Some(folder) = debugfs() else { return String::new() };
    let read = |name: &str| fs::read_to_string(folder.join(name)).unwrap_or_default();
    let passing = [
        "vaddr=",
        "planes_changed=",
        "mode_changed=",
        "active_changed=",
        "connectors_changed=",
        "color_mgmt_changed=",
        "refcount=",
        "vmap_use_count=",
        "pages_use_count=",
        "pages_pin_count=",
    ];
    let text = format!("{}{}", read("state"), read("framebuffer"));
    let lines = text
        .lines()
        .filter(|line| !passing.iter().any(|word| line.trim_start().starts_with(word)));
    lines.map(|line| format!("{line}\n")).collect()
}

/// An open card that is not master. While it is open, the kernel does not put its console back when the last program ends
/// (`drm_lastclose`), so that what is on screen afterwards is that program's own doing.
pub struct Witness(fs::File);

impl AsFd for Witness {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl drm::Device for Witness {}
impl drm::control::Device for Witness {}

impl Witness {
    pub fn new() -> Result<Witness> {
        let file = fs::File::options().read(true).write(true).open(card()?)?;
        let witness = Witness(file);
        // Who opens a card without a master becomes it.
        witness.release_master_lock().context("cannot stop being DRM master")?;
        Ok(witness)
    }
}

/// A shell command as another user, who is in no group of the devices.
pub fn as_nobody(line: &str) -> Command {
    let mut command = Command::new("setpriv");
    command.args(["--reuid", "65534", "--regid", "65534", "--clear-groups", "sh", "-c", line]);
    command.stdin(Stdio::null());
    command
}
