//! `v4l2::Device` and `v4l2::Camera`: how a camera is found, what it offers, what it agrees to.

use std::fs;
use std::os::fd::{AsFd, AsRawFd};
use std::path::Path;

use anyhow::{Context, Result, ensure};
use dmaflow::endpoint::Source;
use dmaflow::error::Kind;
use dmaflow::format::{Format, Fourcc};
use dmaflow::v4l2::{Api, Camera, CameraRequest, ControlKind, Device, RateRequest, Rates, Sizes};

use crate::harness::{Outcome, PASSED, Test};
use crate::modules::vivid;
use crate::process::dma_bufs;

const NEEDS: &[&str] = &["vivid"];

pub const TESTS: &[Test] = &[
    Test { name: "camera::found_by_path_driver_and_card", needs: NEEDS, seconds: 60, run: found },
    Test { name: "camera::offers", needs: NEEDS, seconds: 60, run: offers },
    Test { name: "camera::inputs_change_what_is_offered", needs: NEEDS, seconds: 60, run: inputs },
    Test { name: "camera::controls", needs: NEEDS, seconds: 60, run: controls },
    Test { name: "camera::layout_is_the_drivers", needs: NEEDS, seconds: 60, run: layout },
    Test { name: "camera::both_apis_give_the_same", needs: NEEDS, seconds: 60, run: both_apis },
    Test { name: "camera::buffers_are_exported_once", needs: NEEDS, seconds: 60, run: exported_once },
    Test { name: "camera::requests_that_it_refuses", needs: NEEDS, seconds: 60, run: refuses },
    Test { name: "camera::buffer_counts", needs: NEEDS, seconds: 60, run: buffer_counts },
];

pub fn format(name: &str) -> Format {
    Format::parse(name).expect("a format of ours").0
}

pub fn request(name: &str, size: (u32, u32)) -> CameraRequest {
    CameraRequest { format: Some(format(name)), size: Some(size), ..CameraRequest::default() }
}

pub fn open(name: &str, size: (u32, u32)) -> Result<Camera> {
    Ok(Camera::open(Device::find("vivid")?, &request(name, size))?)
}

fn found() -> anyhow::Result<Outcome> {
    let info = Device::open(Path::new("/dev/video0"))?.info().clone();
    ensure!(info.driver == "vivid" && info.api == Api::SinglePlanar && info.bus.contains("vivid"), "{info:?}");
    for name in ["/dev/video0", "video0", "vivid", "VIVID", info.card.as_str(), &info.card.to_uppercase()] {
        ensure!(Device::find(name).with_context(|| name.to_owned())?.info() == &info, "{name} finds another");
    }
    let list = Device::list();
    ensure!(list.len() == 1 && list[0].as_ref().is_ok_and(|listed| *listed == info), "{list:?}");
    for (name, kind) in [("", Kind::Invalid), ("i", Kind::NotFound), ("vivi", Kind::NotFound)] {
        let error = Device::find(name).err().with_context(|| format!("{name:?} was found"))?;
        ensure!(error.kind() == kind, "{error:?}");
    }
    let error = Device::find("nosuch").err().context("nosuch was found")?;
    ensure!(error.kind() == Kind::NotFound && error.line().contains("/dev/video0 (vivid)"), "{error:?}");
    for (path, kind) in [("/dev/video77", Kind::NotFound), ("/dev/null", Kind::Unsupported), ("/", Kind::System)] {
        let error = Device::open(Path::new(path))
            .err()
            .with_context(|| format!("{path} was opened"))?;
        ensure!(error.kind() == kind && error.line().contains(path), "{path}: {error:?}");
    }
    // Its descriptor goes to no child.
    let device = Device::find("vivid")?;
    ensure!(closes_on_exec(device.as_fd().as_raw_fd())?, "the node is not close-on-exec");
    // Two openings of one node do not disturb each other.
    drop((Device::find("vivid")?, device));
    PASSED
}

fn closes_on_exec(fd: i32) -> Result<bool> {
    let info = fs::read_to_string(format!("/proc/self/fdinfo/{fd}"))?;
    let flags = info.lines().find_map(|line| line.strip_prefix("flags:")).context("no flags")?;
    // O_CLOEXEC, in octal as fdinfo writes it.
    Ok(u32::from_str_radix(flags.trim(), 8)? & 0o2_000_000 != 0)
}

fn offers() -> anyhow::Result<Outcome> {
    let device = Device::find("vivid")?;
    let formats = device.formats()?;
    for name in ["XR24", "AR24", "RG16", "NV12", "YU12", "YUYV"] {
        ensure!(
            formats
                .iter()
                .any(|offer| offer.known.map(|(known, _)| known) == Some(format(name))),
            "no {name}: {formats:?}"
        );
    }
    ensure!(formats.iter().all(|offer| !offer.description.is_empty() && !offer.compressed), "{formats:?}");
    let code = Fourcc::new(b"XR24");
    let sizes = device.sizes(code)?;
    ensure!(sizes.contains(&Sizes::Discrete(640, 360)) && sizes.contains(&Sizes::Discrete(1920, 1080)), "{sizes:?}");
    let rates = device.rates(code, (640, 360))?;
    let offered = |fps: f64| {
        rates
            .iter()
            .any(|rate| matches!(rate, Rates::Discrete(rate) if rate.fps() == Some(fps)))
    };
    ensure!(offered(60.0) && offered(30.0) && !offered(61.0), "{rates:?}");
    ensure!(device.sizes(Fourcc::new(b"none"))?.is_empty(), "sizes of a format that it lacks");
    ensure!(device.rates(code, (641, 360))?.is_empty(), "rates of a size that it lacks");
    PASSED
}

/// The webcam has a list of sizes, the TV input a range.
fn inputs() -> anyhow::Result<Outcome> {
    let device = Device::find("vivid")?;
    let inputs = device.inputs()?;
    ensure!(inputs.len() == 4 && inputs[3].name.contains("HDMI") && inputs[3].index == 3, "{inputs:?}");
    device.set_input(3)?;
    let sizes = device.sizes(Fourcc::new(b"XR24"))?;
    ensure!(matches!(sizes.as_slice(), [Sizes::Stepwise { .. }]), "{sizes:?}");
    let nearest = sizes[0].nearest((700, 500));
    let camera = Camera::open(device, &request("XR24", nearest))?;
    ensure!(camera.layout().size() == nearest, "{} instead of {nearest:?}", camera.layout());
    drop(camera);
    // By the request as well, and the frames are of that input's size.
    let request = CameraRequest { input: Some(3), format: Some(format("XR24")), ..CameraRequest::default() };
    let mut camera = Camera::open(Device::find("vivid")?, &request)?;
    let frame = camera.next()?;
    ensure!(frame.buffer().layout() == camera.layout(), "{}", frame.buffer().layout());
    drop((frame, camera));
    let error = Device::find("vivid")?.set_input(9).err().context("input 9 was set")?;
    ensure!(error.line().contains("3 (HDMI"), "{error:?}");
    PASSED
}

fn controls() -> anyhow::Result<Outcome> {
    let device = Device::find("vivid")?;
    let brightness = device.control("brightness")?;
    ensure!(brightness.kind == ControlKind::Integer && brightness.minimum < brightness.maximum, "{brightness:?}");
    for value in [brightness.minimum, brightness.maximum, brightness.default] {
        device.set_control(&brightness, value)?;
        ensure!(device.get_control(&brightness)? == value, "brightness is not {value}");
    }
    let kinds: Vec<_> = device.controls()?.iter().map(|control| control.kind).collect();
    for kind in
        [ControlKind::Boolean, ControlKind::Menu, ControlKind::Button, ControlKind::Integer64, ControlKind::Bitmask]
    {
        ensure!(kinds.contains(&kind), "no {kind:?} among {kinds:?}");
    }
    let wide = device
        .controls()?
        .into_iter()
        .find(|control| control.kind == ControlKind::Integer64)
        .context("no 64-bit control")?;
    device.set_control(&wide, wide.minimum)?;
    ensure!(device.get_control(&wide)? == wide.minimum && wide.minimum < i64::from(i32::MIN), "{wide:?}");
    device.set_control(&wide, wide.default)?;
    let error = device.control("nosuch").err().context("nosuch was found")?;
    ensure!(error.kind() == Kind::NotFound && error.line().contains("nosuch"), "{error:?}");
    let menu = device.control("wrap_timestamp")?;
    let error = device.set_control(&menu, 77).err().context("77 was set")?;
    ensure!(error.line().contains(&format!("{} to {}", menu.minimum, menu.maximum)), "{error:?}");
    PASSED
}

/// Stride and size come from the driver's reply.
fn layout() -> anyhow::Result<Outcome> {
    for stride in [None, Some(640 * 4 + 64), Some(640 * 4 + 4096)] {
        let request = CameraRequest { stride, ..request("XR24", (640, 360)) };
        let mut camera = Camera::open(Device::find("vivid")?, &request)?;
        let wanted = stride.unwrap_or(640 * 4);
        ensure!(camera.layout().planes()[0].stride == wanted, "{} with {stride:?}", camera.layout());
        let frame = camera.next()?;
        let used = frame.meta().bytes_used[0];
        ensure!(used >= wanted * 360, "{used} bytes used with stride {wanted}");
        let len = frame.buffer().dma_buf(0).context("no dma-buf")?.len();
        ensure!(len >= used as usize, "{len} bytes hold {used}");
    }
    PASSED
}

/// One picture in one, two and three memory planes: the same colour planes.
fn both_apis() -> anyhow::Result<Outcome> {
    let mut row = vec![0; 640];
    let mut luma = |camera: &mut Camera| -> Result<Vec<u8>> {
        let frame = camera.next()?;
        // The middle of the bars, right of the text.
        frame.buffer().read()?.row(0, 200, &mut row);
        Ok(row[400..].to_vec())
    };
    let single = luma(&mut open("NV12", (640, 360))?)?;
    ensure!(single.iter().any(|&byte| byte != single[0]), "a row of one colour: {single:?}");
    vivid(&["multiplanar=2"])?;
    ensure!(Device::find("vivid")?.info().api == Api::MultiPlanar, "not multi-planar");
    for (code, memory_planes) in [(b"NV12", 1), (b"NM12", 2), (b"YM12", 3)] {
        let code = Fourcc::new(code);
        let (known, planes) = Format::from_v4l2(code).context("a known code")?;
        ensure!(planes == memory_planes, "{code} has {planes} memory planes");
        let request = CameraRequest { code: Some(code), size: Some((640, 360)), ..CameraRequest::default() };
        let mut camera = Camera::open(Device::find("vivid")?, &request)?;
        ensure!(
            camera.layout().format() == known && camera.layout().memory_planes() == memory_planes as usize,
            "{}",
            camera.layout()
        );
        ensure!(camera.buffers()[0].memory().len() == memory_planes as usize, "{code}");
        ensure!(luma(&mut camera)? == single, "{code} shows another luma");
    }
    // Where a format is all that is asked for, the code with the fewest memory planes.
    let camera = open("NV12", (640, 360))?;
    ensure!(camera.layout().memory_planes() == 1, "{}", camera.layout());
    PASSED
}

fn exported_once() -> anyhow::Result<Outcome> {
    vivid(&["multiplanar=2"])?;
    let before = dma_bufs();
    let request = CameraRequest { code: Some(Fourcc::new(b"NM12")), buffers: Some(5), ..CameraRequest::default() };
    let mut camera = Camera::open(Device::find("vivid")?, &request)?;
    let buffers = camera.buffers();
    ensure!(buffers.len() == 5, "{} buffers", buffers.len());
    let mut identities: Vec<_> = buffers
        .iter()
        .flat_map(|buffer| [0, 1].map(|plane| buffer.dma_buf(plane).unwrap().identity()))
        .collect();
    for buffer in buffers {
        for plane in [0, 1] {
            ensure!(
                closes_on_exec(buffer.dma_buf(plane).context("no dma-buf")?.as_fd().as_raw_fd())?,
                "not close-on-exec"
            );
        }
    }
    identities.sort();
    identities.dedup();
    ensure!(identities.len() == 10, "{} identities of 10 memory planes", identities.len());
    // The kernel's own list agrees, also after frames have flowed.
    let inodes: std::collections::BTreeSet<_> = identities.iter().map(|identity| identity.inode()).collect();
    for _ in 0..12 {
        let frame = camera.next()?;
        let inode = frame.buffer().dma_buf(1).context("no dma-buf")?.identity().inode();
        ensure!(inodes.contains(&inode), "a frame came in a buffer that is none of the camera's");
    }
    let now: std::collections::BTreeSet<_> = dma_bufs().difference(&before).copied().collect();
    ensure!(now == inodes, "the kernel has {now:?}, the camera {inodes:?}");
    drop(camera);
    ensure!(dma_bufs() == before, "dma-bufs stayed");
    PASSED
}

fn refuses() -> anyhow::Result<Outcome> {
    let fails = |request: CameraRequest| -> Result<(Kind, String)> {
        let opened = Camera::open(Device::find("vivid")?, &request);
        let error = opened.err().with_context(|| format!("{request:?} was agreed to"))?;
        Ok((error.kind(), error.line()))
    };
    let base = request("XR24", (640, 360));
    let (kind, line) = fails(CameraRequest { format: Some(format("P010")), ..base.clone() })?;
    ensure!(kind == Kind::Unsupported && line.contains("XR24"), "{line}");
    let (kind, line) = fails(CameraRequest { size: Some((700, 400)), ..base.clone() })?;
    ensure!(kind == Kind::Unsupported && line.contains("640x360"), "{line}");
    let (kind, line) = fails(CameraRequest { rate: RateRequest::Exactly(59.0), ..base.clone() })?;
    ensure!(kind == Kind::Unsupported && line.contains("60"), "{line}");
    // Strides that the driver would change without a word; it tells the nearest.
    for stride in [0, 1, 16, 640 * 4 - 4, u32::MAX] {
        let (kind, line) = fails(CameraRequest { stride: Some(stride), ..base.clone() })?;
        let nearest =
            if stride == u32::MAX { "the nearest that it offers is" } else { "the nearest that it offers is 2560" };
        ensure!(kind == Kind::Unsupported && line.contains("stride") && line.contains(nearest), "{line}");
    }
    let (_, line) = fails(CameraRequest { input: Some(4), ..base.clone() })?;
    ensure!(line.contains("input"), "{line}");
    let first = Camera::open(Device::find("vivid")?, &base)?;
    let (kind, line) = fails(base.clone())?;
    ensure!(kind == Kind::Busy && line.contains("close it"), "{line}");
    drop(first);
    // 29.97 is not 30; what differs by a rounding is the same.
    let (kind, line) = fails(CameraRequest { rate: RateRequest::Exactly(29.97), ..base.clone() })?;
    ensure!(kind == Kind::Unsupported && line.contains("the nearest that it offers is 30"), "{line}");
    let camera = Camera::open(Device::find("vivid")?, &CameraRequest { rate: RateRequest::Exactly(59.99), ..base })?;
    ensure!(camera.rate() == Some(60.0), "{:?}", camera.rate());
    PASSED
}

fn buffer_counts() -> anyhow::Result<Outcome> {
    for count in [2, 3, 8, 32] {
        let request = CameraRequest { buffers: Some(count), ..request("RG16", (320, 180)) };
        let mut camera = Camera::open(Device::find("vivid")?, &request)?;
        let given = camera.buffers().len();
        ensure!(given >= count as usize, "{given} buffers of {count}");
        let slots: std::collections::BTreeSet<_> = (0..given * 2)
            .map(|_| camera.next().map(|frame| frame.slot()))
            .collect::<Result<_, _>>()?;
        ensure!(slots.len() == given, "frames came in {} of {given} slots", slots.len());
    }
    PASSED
}
