//! The floor: what the kernel charges for moving a frame from a V4L2 camera to a KMS display, and nothing else.
//!
//! `bench-floor events|blocking WIDTHxHEIGHT FPS FRAMES [MODE]` shows FRAMES frames of vivid on vkms and ends. MODE is
//! as in `640x480`; without it, the mode of the frame's size or the preferred one. Its two loops have these calls and
//! no more:
//! - events: poll, DQBUF, ATOMIC (nonblocking, with event), poll, read, QBUF;
//! - blocking: DQBUF, ATOMIC, QBUF.
//!
//! It checks nothing that a real program must check. `ci/bench/run` compares dmaflow with it.

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::fs::OpenOptionsExt;

use anyhow::{Context, Result, bail};
use drm_ffi::mode;
use nix::libc;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use v4l::v4l_sys as sys;
use v4l::v4l2::vidioc;

const CAPTURE: u32 = 1;
const MMAP: u32 = 1;
const XR24: u32 = u32::from_le_bytes(*b"XR24");
const BUFFERS: u32 = 5;

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let argument = |i: usize| arguments.get(i).map(String::as_str);
    let usage = "bench-floor events|blocking WIDTHxHEIGHT FPS FRAMES [MODE]";
    let size = |text: &str| -> Result<(u32, u32)> {
        let (width, height) = text.split_once('x').context(usage)?;
        Ok((width.parse()?, height.parse()?))
    };
    let events = match argument(0) {
        Some("events") => true,
        Some("blocking") => false,
        _ => bail!(usage),
    };
    let frame = size(argument(1).context(usage)?)?;
    let rate: u32 = argument(2).context(usage)?.parse()?;
    let frames: u32 = argument(3).context(usage)?.parse()?;
    let mode = argument(4).map(size).transpose()?;
    let mut camera = Camera::open("/dev/video0", events, frame, rate)?;
    let mut display = Display::open("vkms")?;
    display.set_up(&camera, mode.unwrap_or(frame))?;
    if events { with_events(&mut camera, &mut display, frames) } else { blocking(&mut camera, &mut display, frames) }
}

fn with_events(camera: &mut Camera, display: &mut Display, frames: u32) -> Result<()> {
    let flags = drm_ffi::DRM_MODE_ATOMIC_NONBLOCK | drm_ffi::DRM_MODE_PAGE_FLIP_EVENT;
    let mut event = [0; 256];
    let mut shown = display.first;
    for _ in 1..frames {
        wait(camera.file.as_fd())?;
        let index = camera.dequeue()?;
        display.show(index, flags)?;
        wait(display.file.as_fd())?;
        if display.file.read(&mut event)? == 0 {
            bail!("no event");
        }
        camera.queue(shown)?;
        shown = index;
    }
    Ok(())
}

fn blocking(camera: &mut Camera, display: &mut Display, frames: u32) -> Result<()> {
    let mut shown = display.first;
    for _ in 1..frames {
        let index = camera.dequeue()?;
        display.show(index, 0)?;
        camera.queue(shown)?;
        shown = index;
    }
    Ok(())
}

fn wait(fd: BorrowedFd<'_>) -> Result<()> {
    poll(&mut [PollFd::new(fd, PollFlags::POLLIN)], PollTimeout::NONE)?;
    Ok(())
}

struct Camera {
    file: File,
    size: (u32, u32),
    stride: u32,
}

/// # Safety
/// `request` must be one that takes a `T`, and a `T` must be fine as zeroes and hold no pointers that the request
/// follows.
unsafe fn call<T>(file: &File, request: libc::c_ulong, argument: &mut T) -> io::Result<()> {
    // SAFETY: a live, exclusive `T`, which the caller vouches is what the request takes.
    match unsafe { libc::ioctl(file.as_raw_fd(), request, std::ptr::from_mut(argument)) } {
        -1 => Err(io::Error::last_os_error()),
        _ => Ok(()),
    }
}

fn buffer(index: u32) -> sys::v4l2_buffer {
    // SAFETY: a C structure of integers and of unions of integers and pointers: zeroes are a value of it.
    let mut buffer: sys::v4l2_buffer = unsafe { std::mem::zeroed() };
    (buffer.type_, buffer.memory, buffer.index) = (CAPTURE, MMAP, index);
    buffer
}

impl Camera {
    fn open(path: &str, events: bool, size: (u32, u32), rate: u32) -> Result<Camera> {
        let flags = if events { libc::O_NONBLOCK } else { 0 };
        let file = File::options()
            .read(true)
            .write(true)
            .custom_flags(flags)
            .open(path)
            .context(path.to_owned())?;
        // SAFETY: C structures of integers and unions of such: zeroes are values of them.
        let (mut format, mut parameters, mut request): (
            sys::v4l2_format,
            sys::v4l2_streamparm,
            sys::v4l2_requestbuffers,
        ) = unsafe { std::mem::zeroed() };
        format.type_ = CAPTURE;
        format.fmt.pix =
            sys::v4l2_pix_format { width: size.0, height: size.1, pixelformat: XR24, field: 1, ..format_zero() };
        // SAFETY: VIDIOC_S_FMT takes a v4l2_format, which has no pointers for this type.
        unsafe { call(&file, vidioc::VIDIOC_S_FMT as _, &mut format) }.context("S_FMT")?;
        // SAFETY: the kernel has filled the same member of the union, for this type.
        let got = unsafe { format.fmt.pix };
        if (got.width, got.height, got.pixelformat) != (size.0, size.1, XR24) {
            bail!("the camera has no XR24 {}x{}", size.0, size.1);
        }
        parameters.type_ = CAPTURE;
        parameters.parm.capture.timeperframe = sys::v4l2_fract { numerator: 1, denominator: rate };
        // SAFETY: VIDIOC_S_PARM takes a v4l2_streamparm, which has no pointers.
        unsafe { call(&file, vidioc::VIDIOC_S_PARM as _, &mut parameters) }.context("S_PARM")?;
        (request.type_, request.memory, request.count) = (CAPTURE, MMAP, BUFFERS);
        // SAFETY: VIDIOC_REQBUFS takes a v4l2_requestbuffers, which has no pointers.
        unsafe { call(&file, vidioc::VIDIOC_REQBUFS as _, &mut request) }.context("REQBUFS")?;
        if request.count != BUFFERS {
            bail!("the camera has {} buffers, not {BUFFERS}", request.count);
        }
        let mut camera = Camera { file, size, stride: got.bytesperline };
        for index in 0..BUFFERS {
            camera.queue(index)?;
        }
        Ok(camera)
    }

    /// A dma-buf of a buffer. Never closed: it lives as long as the process.
    fn export(&self, index: u32) -> Result<i32> {
        // SAFETY: a C structure of integers: zeroes are a value of it.
        let mut export: sys::v4l2_exportbuffer = unsafe { std::mem::zeroed() };
        (export.type_, export.index) = (CAPTURE, index);
        // SAFETY: VIDIOC_EXPBUF takes a v4l2_exportbuffer, which has no pointers.
        unsafe { call(&self.file, vidioc::VIDIOC_EXPBUF as _, &mut export) }.context("EXPBUF")?;
        Ok(export.fd)
    }

    fn start(&mut self) -> Result<()> {
        let mut which = CAPTURE.cast_signed();
        // SAFETY: VIDIOC_STREAMON takes an int.
        unsafe { call(&self.file, vidioc::VIDIOC_STREAMON as _, &mut which) }.context("STREAMON")
    }

    fn queue(&mut self, index: u32) -> Result<()> {
        // SAFETY: VIDIOC_QBUF takes a v4l2_buffer, whose pointers are not followed for this memory type.
        unsafe { call(&self.file, vidioc::VIDIOC_QBUF as _, &mut buffer(index)) }.context("QBUF")
    }

    fn dequeue(&mut self) -> Result<u32> {
        let mut buffer = buffer(0);
        // SAFETY: VIDIOC_DQBUF takes a v4l2_buffer, whose pointers are not followed for this memory type.
        unsafe { call(&self.file, vidioc::VIDIOC_DQBUF as _, &mut buffer) }.context("DQBUF")?;
        Ok(buffer.index)
    }
}

fn format_zero() -> sys::v4l2_pix_format {
    // SAFETY: a C structure of integers: zeroes are a value of it.
    unsafe { std::mem::zeroed() }
}

struct Display {
    file: File,
    plane: u32,
    fb_property: u32,
    framebuffers: [u64; BUFFERS as usize],
    /// The buffer that the modeset shows.
    first: u32,
}

/// An object, its kind, and values for its properties.
type Setting<'a> = (u32, u32, &'a [(&'a str, u64)]);

/// Kinds of objects (`DRM_MODE_OBJECT_*`).
const PLANE: u32 = 0xeeee_eeee;
const CRTC: u32 = 0xcccc_cccc;
const CONNECTOR: u32 = 0xc0c0_c0c0;

impl Display {
    fn open(driver: &str) -> Result<Display> {
        for card in 0..16 {
            let opened = File::options().read(true).write(true).open(format!("/dev/dri/card{card}"));
            let Ok(file) = opened else { continue };
            let mut name = Vec::new();
            drm_ffi::get_version(file.as_fd(), Some(&mut name), None, None)?;
            if name.iter().map(|&c| char::from(c.cast_unsigned())).eq(driver.chars()) {
                return Ok(Display { file, plane: 0, fb_property: 0, framebuffers: [0; BUFFERS as usize], first: 0 });
            }
        }
        bail!("no display of the driver {driver}");
    }

    /// Imports all buffers and shows the first frame.
    fn set_up(&mut self, camera: &Camera, wanted: (u32, u32)) -> Result<()> {
        let fd = self.file.as_fd();
        drm_ffi::set_capability(fd, drm_ffi::DRM_CLIENT_CAP_ATOMIC.into(), true)?;
        for index in 0..BUFFERS {
            let exported = camera.export(index)?;
            // SAFETY: EXPBUF has just made the descriptor, and nobody closes it.
            let exported = unsafe { BorrowedFd::borrow_raw(exported) };
            let handle = drm_ffi::gem::fd_to_handle(fd, exported)?.handle;
            let (pitches, handles) = ([camera.stride, 0, 0, 0], [handle, 0, 0, 0]);
            let (width, height) = camera.size;
            let fb = mode::add_fb2(fd, width, height, XR24, &handles, &pitches, &[0; 4], &[0; 4], 0)?;
            self.framebuffers[index as usize] = fb.fb_id.into();
        }
        let (mut crtcs, mut connectors, mut planes) = (Vec::new(), Vec::new(), Vec::new());
        mode::get_resources(fd, None, Some(&mut crtcs), Some(&mut connectors), None)?;
        mode::get_plane_resources(fd, Some(&mut planes))?;
        let (&crtc, &connector) = crtcs.first().zip(connectors.first()).context("no CRTC or connector")?;
        let primary = |&plane: &u32| matches!(property(fd, plane, PLANE, "type"), Ok((_, 1)));
        self.plane = planes.into_iter().find(primary).context("no primary plane")?;
        let mut modes = Vec::new();
        mode::get_connector(fd, connector, None, None, Some(&mut modes), None, true)?;
        // The mode that is wanted, or the preferred one, which comes first; the frame is in its corner.
        let fits = |mode: &&drm_ffi::drm_mode_modeinfo| (mode.hdisplay.into(), mode.vdisplay.into()) == wanted;
        let chosen = modes.iter().find(fits).or(modes.first()).context("no mode")?;
        // SAFETY: the structure has integers and characters alone, no padding, and is read for as long as `modes`
        // lives.
        let bytes = unsafe { std::slice::from_raw_parts(std::ptr::from_ref(chosen).cast::<u8>(), size_of_val(chosen)) };
        let blob = mode::create_property_blob(fd, &mut bytes.to_vec())?.blob_id;
        let plane = self.plane;
        self.fb_property = property(fd, plane, PLANE, "FB_ID")?.0;

        let mut start = camera.file.try_clone().map(|file| Camera { file, ..*camera })?;
        start.start()?;
        wait(start.file.as_fd())?;
        self.first = start.dequeue()?;
        let (w, h) = (u64::from(camera.size.0), u64::from(camera.size.1));
        let settings: [Setting<'_>; 3] = [
            (connector, CONNECTOR, &[("CRTC_ID", crtc.into())]),
            (crtc, CRTC, &[("MODE_ID", blob.into()), ("ACTIVE", 1)]),
            (
                plane,
                PLANE,
                &[
                    ("FB_ID", self.framebuffers[self.first as usize]),
                    ("CRTC_ID", crtc.into()),
                    ("SRC_X", 0),
                    ("SRC_Y", 0),
                    ("SRC_W", w << 16),
                    ("SRC_H", h << 16),
                    ("CRTC_X", 0),
                    ("CRTC_Y", 0),
                    ("CRTC_W", w),
                    ("CRTC_H", h),
                ],
            ),
        ];
        let (mut objects, mut counts, mut ids, mut values) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        for (object, kind, wanted) in settings {
            objects.push(object);
            counts.push(wanted.len() as u32);
            for &(name, value) in wanted {
                ids.push(property(fd, object, kind, name)?.0);
                values.push(value);
            }
        }
        // The display's cycle starts here, so this decides how long before each vertical blank the frames will come. Just before,
        // and a frame may miss the blank, wait for the next, and find the following frame there already: a frame time late, and one
        // sleep less a frame. Four milliseconds keep the floor in the phase without the delay, in which dmaflow is as well.
        std::thread::sleep(std::time::Duration::from_millis(4));
        let flags = drm_ffi::DRM_MODE_ATOMIC_ALLOW_MODESET;
        mode::atomic_commit(fd, flags, &mut objects, &mut counts, &mut ids, &mut values).context("modeset")
    }

    fn show(&mut self, index: u32, flags: u32) -> Result<()> {
        let mut framebuffer = [self.framebuffers[index as usize]];
        let (mut plane, mut property) = ([self.plane], [self.fb_property]);
        let fd = self.file.as_fd();
        mode::atomic_commit(fd, flags, &mut plane, &mut [1], &mut property, &mut framebuffer).context("ATOMIC")
    }
}

/// Number and value of an object's property.
fn property(fd: BorrowedFd<'_>, object: u32, kind: u32, name: &str) -> Result<(u32, u64)> {
    let (mut ids, mut values) = (Vec::new(), Vec::new());
    mode::get_properties(fd, object, kind, Some(&mut ids), Some(&mut values))?;
    for (id, value) in ids.into_iter().zip(values) {
        let found = mode::get_property(fd, id, Some(&mut Vec::new()), Some(&mut Vec::new()))?.name;
        if found
            .iter()
            .map(|&c| char::from(c.cast_unsigned()))
            .take_while(|&c| c != '\0')
            .eq(name.chars())
        {
            return Ok((id, value));
        }
    }
    bail!("object {object} has no property {name}")
}
