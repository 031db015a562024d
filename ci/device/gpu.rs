//! The module `vulkan` from a program's side: imports, their refusals, a device that is the program's own.

use std::fs;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use anyhow::{Context, Result, ensure};
use dmaflow::dmabuf::DmaBuf;
use dmaflow::endpoint::{ImportCache, Importer, Ready, Refusal, Rung, Sink, Source, SourceCounts};
use dmaflow::format::{Layout, Modifier, PlaneLayout};
use dmaflow::frame::{Buffer, Frame, Room};
use dmaflow::kms::{Display, DisplayRequest};
use dmaflow::ladder::Path;
use dmaflow::memory::{Allocator, Memory};
use dmaflow::pipe::{Limits, Pipe};
use dmaflow::v4l2::Camera;
use dmaflow::vulkan::ash::{self, vk};
use dmaflow::vulkan::{Gpu, GpuBuffer, GpuImporter, GpuRequest, RawGpu, Vulkan};

use crate::alloc::held;
use crate::camera::{format, open};
use crate::harness::{Outcome, PASSED, Test, note};
use crate::process::{State, dma_bufs};
use crate::sinks::read_png;

const NEEDS: &[&str] = &["vivid", "vkms", "udmabuf", "vulkaninfo"];

pub const TESTS: &[Test] = &[
    Test { name: "gpu::refusals", needs: NEEDS, seconds: 120, run: refusals },
    Test { name: "gpu::read_only_exports", needs: NEEDS, seconds: 180, run: read_only_exports },
    Test { name: "gpu::bytes_of_a_buffer", needs: NEEDS, seconds: 120, run: bytes_of_a_buffer },
    Test { name: "gpu::a_device_of_the_program", needs: NEEDS, seconds: 120, run: a_device_of_the_program },
    Test { name: "gpu::a_texture", needs: NEEDS, seconds: 120, run: a_texture },
    Test { name: "gpu::a_thousand_imports", needs: NEEDS, seconds: 600, run: a_thousand_imports },
];

/// A GPU under the eyes of the validation layer.
pub fn watched() -> Result<Gpu> {
    Ok(Gpu::open(&GpuRequest { name: Some("llvmpipe".into()), validation: true })?)
}

/// The layer has said nothing, also at the end of the GPU, which must be the last of its clones.
pub fn silent(gpu: Gpu) -> Result<()> {
    let messages = gpu.messages().context("nobody watches")?;
    drop(gpu);
    let all = messages.all();
    ensure!(all.is_empty(), "the validation layer said: {}", all.join("\n"));
    Ok(())
}

fn refused(importer: &mut GpuImporter, buffer: &Buffer, step: &str, word: &str) -> Result<Refusal> {
    let refusal = importer
        .import(buffer)
        .err()
        .with_context(|| format!("{} was imported", buffer.layout()))?;
    ensure!(refusal.step == step && refusal.why.contains(word) && !refusal.repair.is_empty(), "{refusal}");
    Ok(refusal)
}

fn refusals() -> anyhow::Result<Outcome> {
    let before = State::read();
    let gpu = watched()?;
    let mut importer = GpuImporter::new(gpu.clone(), vk::ImageUsageFlags::SAMPLED);
    let camera = open("XR24", (320, 180))?;
    let good = &camera.buffers()[0];
    let image = importer.import(good)?;
    ensure!(
        image.size() == (320, 180) && image.format() == vk::Format::B8G8R8A8_UNORM && !image.is_disjoint(),
        "{image:?}"
    );
    ensure!(image.modifier() == Modifier::LINEAR, "{image:?}");
    drop(image);
    let layout = *good.layout();

    // Another tiling: I915_FORMAT_MOD_X_TILED, which no software driver has.
    let tiled = good.with_layout(layout.with_modifier(Modifier::from_drm((1 << 56) | 1)))?;
    refused(&mut importer, &tiled, "modifiers", "0x0100000000000001")?;
    // Rows that are no whole texels.
    let plane = PlaneLayout { memory: 0, offset: 0, stride: 1282 };
    let odd = good.with_layout(Layout::new(layout.format(), (320, 100), &[plane])?)?;
    refused(&mut importer, &odd, "stride", "1282")?;
    // No such format; odd chroma; no memory that can be shared.
    let room = Room::default();
    let made = |name: &str, size, allocator| -> Result<Buffer> {
        Ok(Buffer::allocate(allocator, &Layout::packed(format(name), size, 1)?, &room)?)
    };
    refused(&mut importer, &made("YUYV", (64, 48), Allocator::Udmabuf)?, "formats", "YUYV")?;
    refused(&mut importer, &made("XR24", (64, 48), Allocator::Plain)?, "import", "plain")?;
    // More than an image may be: on the edge of memory that a driver wants to be longer.
    refused(
        &mut importer,
        &made("GREY", (65536, 1), Allocator::Udmabuf)?,
        "vkGetPhysicalDeviceImageFormatProperties2",
        "65536x1",
    )?;
    for allocator in [Allocator::Udmabuf, Allocator::SystemHeap] {
        importer.import(&made("XR24", (64, 48), allocator)?)?;
        let planes = importer.import_planes(&made("NV12", (63, 47), allocator)?)?;
        let sizes: Vec<_> = planes.iter().map(|image| (image.size(), image.format())).collect();
        let wanted = [((63, 47), vk::Format::R8_UNORM), ((32, 24), vk::Format::R8G8_UNORM)];
        ensure!(sizes == wanted, "{sizes:?}");
    }
    // A DRM driver's buffer: nobody knows how it is tiled until somebody states it.
    let mut display = Display::find("vkms", DisplayRequest::default())?;
    let dumb = display.allocate(&Layout::packed(format("XR24"), (320, 180), 1)?, &room, 1)?;
    refused(&mut importer, &dumb[0], "modifiers", "drm")?;
    importer.import(&dumb[0].with_layout(dumb[0].layout().with_modifier(Some(Modifier::LINEAR)))?)?;

    // Once for each buffer, and with the same memory under another handle too.
    let mut cache = ImportCache::new();
    for _ in 0..3 {
        for buffer in camera.buffers() {
            cache.get(&mut importer, buffer)?;
        }
    }
    ensure!(cache.imports() == camera.buffers().len() as u64, "{} imports", cache.imports());
    drop((cache, importer, tiled, odd, dumb, display, camera));
    silent(gpu)?;
    before.is_back()?;
    PASSED
}

/// A camera whose own buffers are exported for reading alone, as some programs do.
struct ReadOnly {
    camera: Camera,
    exported: Option<Vec<Buffer>>,
}

nix::ioctl_readwrite!(expbuf, b'V', 16, v4l::v4l_sys::v4l2_exportbuffer);

impl ReadOnly {
    fn new(camera: Camera) -> Result<ReadOnly> {
        let export = |index: usize, like: &Buffer| -> Result<Buffer> {
            // SAFETY: all of it is numbers, for which 0 is a value.
            let mut request: v4l::v4l_sys::v4l2_exportbuffer = unsafe { std::mem::zeroed() };
            // V4L2_BUF_TYPE_VIDEO_CAPTURE
            request.type_ = 1;
            request.index = index.try_into()?;
            request.flags = (nix::libc::O_RDONLY | nix::libc::O_CLOEXEC).try_into()?;
            // SAFETY: the structure is the one that the kernel expects, and lives across the call.
            unsafe { expbuf(camera.as_fd().as_raw_fd(), &mut request) }?;
            // SAFETY: the kernel has just made this descriptor for us.
            let fd = unsafe { OwnedFd::from_raw_fd(request.fd) };
            Ok(Buffer::new(*like.layout(), vec![Memory::DmaBuf(DmaBuf::new(fd)?)], like.memory_lens())?)
        };
        let exported = camera
            .buffers()
            .iter()
            .enumerate()
            .map(|(index, like)| export(index, like))
            .collect::<Result<_>>()?;
        Ok(ReadOnly { camera, exported: Some(exported) })
    }
}

impl AsFd for ReadOnly {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.camera.as_fd()
    }
}

impl Source for ReadOnly {
    fn name(&self) -> &str {
        self.camera.name()
    }

    fn layout(&self) -> &Layout {
        self.camera.layout()
    }

    fn rate(&self) -> Option<f64> {
        self.camera.rate()
    }

    fn buffers(&self) -> &[Buffer] {
        self.exported.as_deref().unwrap_or(self.camera.buffers())
    }

    fn start(&mut self) -> dmaflow::Result<()> {
        self.camera.start()
    }

    fn try_next(&mut self, ready: Ready) -> dmaflow::Result<Option<Frame>> {
        self.camera.try_next(ready)
    }

    fn recycle(&mut self) -> dmaflow::Result<()> {
        self.camera.recycle()
    }

    fn stop(&mut self) -> dmaflow::Result<()> {
        self.camera.stop()
    }

    fn agree(&mut self, wished: &Layout) -> dmaflow::Result<(Layout, Room)> {
        self.exported = None;
        self.camera.agree(wished)
    }

    fn use_buffers(&mut self, buffers: Vec<Buffer>) -> dmaflow::Result<()> {
        self.camera.use_buffers(buffers)
    }

    fn use_own_buffers(&mut self) -> dmaflow::Result<()> {
        self.camera.use_own_buffers()
    }

    fn stalled(&self) -> dmaflow::Error {
        self.camera.stalled()
    }

    fn counts(&self) -> SourceCounts {
        self.camera.counts()
    }
}

fn read_only_exports() -> anyhow::Result<Outcome> {
    let gpu = watched()?;
    let mut source = ReadOnly::new(open("XR24", (320, 180))?)?;
    let fds = fs::read_dir("/proc/self/fd")?.count();
    let mut importer = GpuImporter::new(gpu.clone(), vk::ImageUsageFlags::SAMPLED);
    for buffer in source.buffers() {
        let refusal = refused(&mut importer, buffer, "vkAllocateMemory", "read-only")?;
        ensure!(refusal.repair.contains("export read-write"), "{refusal}");
    }
    ensure!(fs::read_dir("/proc/self/fd")?.count() == fds, "a refused import keeps a descriptor");
    // The ladder goes on: buffers of a common allocator, still without a copy.
    let mut sink = Vulkan::new(gpu.clone(), true)?;
    let limits = Limits { frames: Some(20), duration: None };
    let pipe = Pipe::join(&mut source, &mut sink, Path::ZeroCopy, limits)?;
    ensure!(pipe.rung() == Rung::Reverse, "{}", pipe.rung());
    let first = pipe.refusals().first().context("no refusal")?.clone();
    ensure!(first.rung == Rung::Exported && first.step == "vkAllocateMemory", "{first}");
    ensure!(first.repair.contains("export read-write"), "{first}");
    let account = pipe.run(None, &mut |_| {})?;
    ensure!(account.captured == 20 && account.presented == 20 && account.copies.bytes() == 0, "{}", account.captured);
    let verdict = sink.verdict().context("no verdict")?;
    ensure!(verdict.checked == 20 && verdict.wrong == 0, "{verdict:?}");
    drop((sink, source, importer));
    silent(gpu)?;
    PASSED
}

/// The bytes that a shader or a copy finds in an imported `VkBuffer` are those that the camera has written.
fn bytes_of_a_buffer() -> anyhow::Result<Outcome> {
    let gpu = watched()?;
    let mut camera = open("YUYV", (320, 180))?;
    let frame = camera.next()?;
    let usage = vk::BufferUsageFlags::TRANSFER_SRC | vk::BufferUsageFlags::STORAGE_BUFFER;
    let imported = GpuBuffer::import(&gpu, frame.buffer(), 0, usage)?;
    ensure!(imported.len() >= 320 * 180 * 2, "{}", imported.len());
    let refusal = GpuBuffer::import(&gpu, frame.buffer(), 1, usage)
        .err()
        .context("a plane that is none was imported")?;
    ensure!(refusal.step == "import", "{refusal}");
    // A second import of the same memory is another buffer to write through.
    let layout = Layout::packed(format("YUYV"), (320, 180), 1)?;
    let target = Buffer::allocate(Allocator::Udmabuf, &layout, &Room::default())?;
    let written = GpuBuffer::import(&gpu, &target, 0, vk::BufferUsageFlags::TRANSFER_DST)?;
    let device = gpu.device();
    // SAFETY: handles of one device, each used as it was made for, and waited for before anything is destroyed.
    unsafe {
        let pool = device
            .create_command_pool(&vk::CommandPoolCreateInfo::default().queue_family_index(gpu.queue_family()), None)?;
        let info = vk::CommandBufferAllocateInfo::default()
            .command_pool(pool)
            .command_buffer_count(1);
        let commands = device.allocate_command_buffers(&info)?[0];
        device.begin_command_buffer(commands, &vk::CommandBufferBeginInfo::default())?;
        let (transfer, none) = (vk::PipelineStageFlags::TRANSFER, vk::DependencyFlags::empty());
        let (read, write) = (vk::AccessFlags::TRANSFER_READ, vk::AccessFlags::TRANSFER_WRITE);
        let acquire = [imported.acquire(read), written.acquire(write)];
        device.cmd_pipeline_barrier(commands, transfer, transfer, none, &[], &acquire, &[]);
        let all = [vk::BufferCopy { src_offset: 0, dst_offset: 0, size: 320 * 180 * 2 }];
        device.cmd_copy_buffer(commands, imported.raw(), written.raw(), &all);
        let release = [imported.release(vk::AccessFlags::empty()), written.release(write)];
        let end = vk::PipelineStageFlags::BOTTOM_OF_PIPE;
        device.cmd_pipeline_barrier(commands, transfer, end, none, &[], &release, &[]);
        device.end_command_buffer(commands)?;
        let commands = [commands];
        let queue = *gpu.queue().lock().expect("nobody panics");
        device.queue_submit(queue, &[vk::SubmitInfo::default().command_buffers(&commands)], vk::Fence::null())?;
        device.queue_wait_idle(queue)?;
        device.destroy_command_pool(pool, None);
    }
    let (captured, copied) = (frame.buffer().read()?, target.read()?);
    let (mut one, mut other) = ([0; 640], [0; 640]);
    let mut values = std::collections::BTreeSet::new();
    for row in 0..180 {
        captured.row(0, row, &mut one);
        copied.row(0, row, &mut other);
        ensure!(one == other, "row {row} differs");
        values.extend(one);
    }
    ensure!(values.len() > 8, "vivid drew nothing: {values:?}");
    drop((captured, copied));
    drop((imported, written, frame, camera));
    silent(gpu)?;
    PASSED
}

/// A program hands its device in, gets an image, and destroys all of it itself.
fn a_device_of_the_program() -> anyhow::Result<Outcome> {
    let camera = open("XR24", (320, 180))?;
    let layout = Layout::packed(format("NV12"), (320, 180), 1)?;
    let nv12 = Buffer::allocate(Allocator::Udmabuf, &layout, &Room::default())?;
    let fds = fs::read_dir("/proc/self/fd")?.count();
    for ycbcr in [true, false] {
        // SAFETY: handles are used with what they were made of, and destroyed once, children first.
        unsafe {
            let entry = ash::Entry::load()?;
            let application = vk::ApplicationInfo::default().api_version(vk::API_VERSION_1_2);
            let instance =
                entry.create_instance(&vk::InstanceCreateInfo::default().application_info(&application), None)?;
            let physical = instance.enumerate_physical_devices()?[0];
            let names: Vec<_> = Gpu::EXTENSIONS.iter().map(|name| name.as_ptr()).collect();
            let priorities = [1.0];
            let queues = [vk::DeviceQueueCreateInfo::default()
                .queue_family_index(0)
                .queue_priorities(&priorities)];
            let mut features =
                vk::PhysicalDeviceSamplerYcbcrConversionFeatures::default().sampler_ycbcr_conversion(ycbcr);
            let info = vk::DeviceCreateInfo::default()
                .queue_create_infos(&queues)
                .enabled_extension_names(&names)
                .push_next(&mut features);
            let device = instance.create_device(physical, &info, None)?;
            let queue = device.get_device_queue(0, 0);
            let (its_instance, its_device) = (instance.clone(), device.clone());
            let raw = RawGpu { instance: its_instance, physical, device: its_device, queue_family: 0, queue, ycbcr };
            let gpu = Gpu::from_raw(raw)?;
            ensure!(gpu.info().is_software() && gpu.messages().is_none(), "{:?}", gpu.info());
            let mut importer = GpuImporter::new(gpu.clone(), vk::ImageUsageFlags::SAMPLED);
            let image = importer.import(&camera.buffers()[0])?;
            let raw = image.into_raw();
            ensure!(raw.image != vk::Image::null() && raw.memory.len() == 1 && raw.size == (320, 180), "{raw:?}");
            // lavapipe has no image of all planes of NV12; but without the feature it is not asked.
            let step = "vkGetPhysicalDeviceImageFormatProperties2";
            let refusal = refused(&mut importer, &nv12, step, "NV12")?;
            ensure!(refusal.why.contains("samplerYcbcrConversion") != ycbcr, "{refusal}");
            ensure!(importer.import_planes(&nv12)?.len() == 2, "planes of NV12");
            // Nothing of the program's is destroyed with the last of ours.
            drop((importer, gpu));
            device.destroy_image(raw.image, None);
            raw.memory.iter().for_each(|&memory| device.free_memory(memory, None));
            device.destroy_device(None);
            instance.destroy_instance(None);
        }
    }
    ensure!(fs::read_dir("/proc/self/fd")?.count() == fds, "descriptors are left");
    PASSED
}

/// The example, as it stands.
#[path = "../../examples/vulkan_texture.rs"]
#[allow(dead_code)] // its main
mod texture;

/// The camera's picture on a grey ground: vivid's bars, so many colours in the middle, and none at the corners. Removes the file.
pub fn has_turned_bars(file: &std::path::Path) -> Result<()> {
    let ((width, height), rgb) = read_png(file)?;
    fs::remove_file(file)?;
    ensure!((width, height) == (640, 480), "{width}x{height}");
    let at = |x: u32, y: u32| {
        let start = (y * width + x) as usize * 3;
        [rgb[start], rgb[start + 1], rgb[start + 2]]
    };
    for (x, y) in [(0, 0), (639, 0), (0, 479), (639, 479)] {
        ensure!(at(x, y) == [51, 51, 51], "the ground is {:?} at {x}, {y}", at(x, y));
    }
    let coloured = |[red, green, blue]: [u8; 3]| red.max(green).max(blue) - red.min(green).min(blue) > 100;
    let middle: std::collections::BTreeSet<_> =
        (200..440).map(|x| at(x, 240)).filter(|&pixel| coloured(pixel)).collect();
    ensure!(middle.len() >= 4, "no bars in the middle: {middle:?}");
    Ok(())
}

fn a_texture() -> anyhow::Result<Outcome> {
    let gpu = watched()?;
    let file = std::env::temp_dir().join(format!("texture.{}.png", std::process::id()));
    texture::render(&gpu, "vivid", &file)?;
    has_turned_bars(&file)?;
    silent(gpu)?;
    PASSED
}

/// Resident memory in KiB: anonymous (heaps and stacks), and of files (libraries' pages, which the kernel maps and drops as it likes).
fn resident_kib() -> Result<[u64; 2]> {
    let status = fs::read_to_string("/proc/self/status")?;
    let of = |key: &str| -> Result<u64> {
        let line = status.lines().find_map(|line| line.strip_prefix(key)).context(key.to_owned())?;
        Ok(line.trim().trim_end_matches(" kB").trim().parse()?)
    };
    Ok([of("RssAnon:")?, of("RssFile:")?])
}

/// What a cycle must not leave behind: descriptors, dma-bufs, mappings of them, and bytes of Rust's heap.
fn left() -> Result<[u64; 4]> {
    let mappings = fs::read_to_string("/proc/self/maps")?
        .lines()
        .filter(|line| line.contains("dmabuf"))
        .count();
    let (fds, buffers) = (fs::read_dir("/proc/self/fd")?.count(), dma_bufs().len());
    // Last: nothing of the above is on the heap any more.
    Ok([fds as u64, buffers as u64, mappings as u64, held()])
}

/// From the tenth cycle on everything is as it was after it, but for KiB that the driver keeps by itself, which are given back.
fn cycles(what: &str, count: u32, once: &mut dyn FnMut() -> Result<()>) -> Result<u64> {
    (0..10).try_for_each(|_| once())?;
    let (before, resident) = (left()?, resident_kib()?);
    (10..count).try_for_each(|_| once())?;
    let after = left()?;
    let [grown, files] =
        std::array::from_fn(|which| resident_kib().map(|now| now[which].saturating_sub(resident[which])));
    let (grown, files) = (grown?, files?);
    note(&format!("{what}: {grown} KiB more after {count} cycles than after 10, and {files} KiB of files"));
    ensure!(
        before == after,
        "{what}: descriptors, dma-bufs, mappings, heap: {before:?} after 10, {after:?} after {count}"
    );
    Ok(grown)
}

/// KiB by which a thousand cycles may grow after the thousand before them.
///
/// Without the kernel's transparent huge pages, that is: khugepaged puts one in the place of a few small pages of a heap whenever it comes by
/// (Debian has them `always` on), which shows as a jump. Seen on lavapipe (Mesa 25.0.7, Linux 6.12): 1.4 to 12 MiB of anonymous memory
/// after 1,000 cycles in one loop and 0 in the next, in this library's loops and likewise in loops of bare Vulkan calls (`vkCreateImage`,
/// an import, `vkFreeMemory`; or `vkAllocateMemory` of memory to be exported); 0 in every loop of three runs without huge pages.
const KEPT: u64 = 1024;

/// A thousand cycles, and as many more in which nothing grows.
pub fn comes_to_a_level(what: &str, once: &mut dyn FnMut() -> Result<()>) -> Result<()> {
    const CYCLES: u32 = 1000;
    // See `KEPT`. SAFETY: this option takes numbers alone.
    let disabled = unsafe { nix::libc::prctl(nix::libc::PR_SET_THP_DISABLE, 1, 0, 0, 0) };
    ensure!(disabled == 0, "huge pages cannot be done without: {}", std::io::Error::last_os_error());
    cycles(what, CYCLES, once)?;
    let grown = cycles(&format!("{what}, once more"), CYCLES, once)?;
    ensure!(grown <= KEPT, "{what}: {grown} KiB more in the second {CYCLES} cycles");
    Ok(())
}

fn a_thousand_imports() -> anyhow::Result<Outcome> {
    let gpu = Gpu::open(&GpuRequest::default())?;
    let camera = open("NV12", (320, 180))?;
    let buffers = camera.buffers();
    let importer = GpuImporter::new(gpu.clone(), vk::ImageUsageFlags::SAMPLED);
    comes_to_a_level("images", &mut || {
        buffers
            .iter()
            .try_for_each(|buffer| importer.import_planes(buffer).map(drop).map_err(Into::into))
    })?;
    comes_to_a_level("buffers", &mut || {
        buffers.iter().try_for_each(|buffer| {
            let usage = vk::BufferUsageFlags::STORAGE_BUFFER;
            GpuBuffer::import(&gpu, buffer, 0, usage).map(drop).map_err(Into::into)
        })
    })?;
    // Whole sinks too: pipelines, views, descriptors, commands.
    let sinks = cycles("sinks", 50, &mut || {
        let mut sink = Vulkan::new(gpu.clone(), false)?;
        sink.join(camera.layout(), camera.rate(), camera.buffers())
            .map_err(anyhow::Error::from)?;
        Ok(())
    })?;
    ensure!(sinks <= KEPT, "sinks: {sinks} KiB");
    drop((importer, camera, gpu));
    PASSED
}
