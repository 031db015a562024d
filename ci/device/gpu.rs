//! The module `vulkan` from a program's side: imports, and their refusals.

use std::fs;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use anyhow::{Context, Result, ensure};
use dmaflow::dmabuf::DmaBuf;
use dmaflow::endpoint::{ImportCache, Importer, Ready, Refusal, Rung, Sink, Source, SourceCounts};
use dmaflow::error::Kind;
use dmaflow::format::{Layout, Modifier, PlaneLayout};
use dmaflow::frame::{Buffer, Frame, Room};
use dmaflow::kms::{Display, DisplayRequest};
use dmaflow::ladder::Path;
use dmaflow::memory::{Allocator, Memory};
use dmaflow::pipe::{Limits, Pipe};
use dmaflow::v4l2::Camera;
use dmaflow::vulkan::ash::vk;
use dmaflow::vulkan::{Gpu, GpuBuffer, GpuImporter, GpuRequest, Vulkan};

use crate::camera::{format, open};
use crate::growth::{KEPT, comes_to_a_level, cycles};
use crate::harness::{Outcome, PASSED, Test, note};
use crate::process::State;
use crate::sinks::read_png;

const NEEDS: &[&str] = &["vivid", "vkms", "udmabuf", "vulkaninfo"];

pub const TESTS: &[Test] = &[
    Test { name: "gpu::refusals", needs: NEEDS, seconds: 120, run: refusals },
    Test { name: "gpu::read_only_exports", needs: NEEDS, seconds: 180, run: read_only_exports },
    Test { name: "gpu::bytes_of_a_buffer", needs: NEEDS, seconds: 120, run: bytes_of_a_buffer },
    Test { name: "gpu::several_planes", needs: NEEDS, seconds: 120, run: several_planes },
    Test { name: "gpu::uses", needs: NEEDS, seconds: 120, run: uses },
    Test { name: "gpu::what_is_passed_over", needs: NEEDS, seconds: 120, run: what_is_passed_over },
    Test { name: "gpu::one_after_the_other", needs: NEEDS, seconds: 120, run: one_after_the_other },
    Test { name: "gpu::a_texture", needs: NEEDS, seconds: 120, run: a_texture },
    Test { name: "gpu::a_thousand_imports", needs: NEEDS, seconds: 600, run: a_thousand_imports },
];

/// lavapipe, which every machine has.
pub const LAVAPIPE: &str = "llvmpipe";

/// A part of the name of the GPU that the tests are for.
pub fn tested() -> String {
    std::env::var("DMAFLOW_TEST_GPU").unwrap_or_else(|_| LAVAPIPE.to_owned())
}

/// Whether this is what the command says of that GPU.
pub fn is_tested(said: &serde_json::Value) -> bool {
    let name = said["name"].as_str().unwrap_or_default().to_lowercase();
    let software = said["software"].as_bool();
    name.contains(&tested().to_lowercase()) && software == Some(tested() == LAVAPIPE)
}

/// A GPU under the eyes of the validation layer.
pub fn watched() -> Result<Gpu> {
    Ok(Gpu::open(&GpuRequest { name: Some(tested()), validation: true, ..GpuRequest::default() })?)
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
        let repair = &refusal.repair;
        ensure!(repair.contains("export read-write") && repair.contains("share --writable"), "{refusal}");
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

/// NV12 in one dma-buf and in two, as one image where the driver lists such, and plane by plane.
fn several_planes() -> anyhow::Result<Outcome> {
    let gpu = watched()?;
    let nv12 = format("NV12");
    let offers = gpu.offers(vk::ImageUsageFlags::SAMPLED);
    let offer = offers.iter().find(|offer| offer.format == nv12).context("no NV12")?;
    let linear = offer
        .modifiers
        .iter()
        .find(|one| one.modifier == Modifier::LINEAR)
        .context("no LINEAR")?;
    note(&format!("as one {}, disjoint {}", linear.as_one, linear.disjoint));
    let mut importer = GpuImporter::new(gpu.clone(), vk::ImageUsageFlags::SAMPLED);
    let layouts = [(Layout::packed(nv12, (64, 48), 1)?, false), (Layout::separate(nv12, (64, 48), &[64, 64])?, true)];
    for (layout, apart) in layouts {
        let buffer = Buffer::allocate(Allocator::Udmabuf, &layout, &Room::default())?;
        match importer.import(&buffer) {
            Ok(image) => {
                ensure!(linear.as_one && (linear.disjoint || !apart), "imported, and not listed: {linear:?}");
                ensure!(image.is_disjoint() == apart && image.size() == (64, 48), "{image:?}");
                ensure!(image.format() == vk::Format::G8_B8R8_2PLANE_420_UNORM, "{image:?}");
                let device = gpu.device().clone();
                let raw = image.into_raw();
                ensure!(raw.memory.len() == if apart { 2 } else { 1 }, "{raw:?}");
                // SAFETY: ours now, and used by nothing.
                unsafe {
                    device.destroy_image(raw.image, None);
                    raw.memory.iter().for_each(|&memory| device.free_memory(memory, None));
                }
            }
            Err(refusal) => {
                ensure!(!linear.as_one || (apart && !linear.disjoint), "listed, and refused: {refusal}");
                ensure!(!refusal.repair.is_empty(), "{refusal}");
            }
        }
        let planes = importer.import_planes(&buffer)?;
        let sizes: Vec<_> = planes
            .iter()
            .map(|image| (image.size(), image.format(), image.is_disjoint()))
            .collect();
        let wanted = [((64, 48), vk::Format::R8_UNORM, false), ((32, 24), vk::Format::R8G8_UNORM, false)];
        ensure!(sizes == wanted, "{sizes:?}");
    }
    silent(gpu)?;
    PASSED
}

/// Uses that the specification has no place for, or wants more for, do not reach the driver.
fn uses() -> anyhow::Result<Outcome> {
    let gpu = watched()?;
    let layout = Layout::packed(format("XR24"), (64, 48), 1)?;
    let buffer = Buffer::allocate(Allocator::Udmabuf, &layout, &Room::default())?;
    let room = Room::default();
    let transient = vk::ImageUsageFlags::SAMPLED | vk::ImageUsageFlags::TRANSIENT_ATTACHMENT;
    for usage in [vk::ImageUsageFlags::empty(), transient] {
        refused(&mut GpuImporter::new(gpu.clone(), usage), &buffer, "usage", "used as")?;
        let error = gpu.make_buffer(&layout, &room, usage, &[]).err().context("made")?;
        ensure!(error.kind() == Kind::Invalid && error.line().contains("used as"), "{}", error.line());
        ensure!(gpu.offers(usage).is_empty(), "{usage:?} is offered");
    }
    let address = vk::BufferUsageFlags::STORAGE_BUFFER | vk::BufferUsageFlags::SHADER_DEVICE_ADDRESS;
    for usage in [vk::BufferUsageFlags::empty(), address] {
        let refusal = GpuBuffer::import(&gpu, &buffer, 0, usage).err().context("imported")?;
        ensure!(refusal.step == "usage" && refusal.why.contains("used as"), "{refusal}");
        let error = gpu.make_bytes(&layout, &room, usage).err().context("made")?;
        ensure!(error.kind() == Kind::Invalid && error.line().contains("used as"), "{}", error.line());
    }
    silent(gpu)?;
    PASSED
}

/// Of all that the layer says, one rule is left out, once for each view: with lavapipe it is wrong.
fn what_is_passed_over() -> anyhow::Result<Outcome> {
    let gpu = watched()?;
    let messages = gpu.messages().context("nobody watches")?;
    let camera = open("XR24", (320, 180))?;
    let mut sink = Vulkan::new(gpu.clone(), false)?;
    for count in 1..=3 {
        sink.join(camera.layout(), camera.rate(), &camera.buffers()[..count])?;
        ensure!(messages.passed_over() == count, "{} for {count} views", messages.passed_over());
    }
    drop((sink, camera));
    silent(gpu)?;
    ensure!(messages.passed_over() == 3, "{} in all", messages.passed_over());
    PASSED
}

/// All GPUs that a request can mean, each opened in its turn.
fn one_after_the_other() -> anyhow::Result<Outcome> {
    let named = |name: &str| GpuRequest { name: Some(name.to_owned()), ..GpuRequest::default() };
    for request in [GpuRequest::default(), named(&tested())] {
        let gpus = Gpu::open_each(&request).collect::<Result<Vec<_>, _>>()?;
        let best = Gpu::open(&request)?;
        ensure!(gpus.first().is_some_and(|gpu| gpu.info() == best.info()), "{gpus:?} and {best:?}");
    }
    let lavapipes = Gpu::open_each(&named(LAVAPIPE)).collect::<Result<Vec<_>, _>>()?;
    ensure!(lavapipes.len() == 1, "one, opened once: {lavapipes:?}");
    let none: Vec<_> = Gpu::open_each(&named("nosuch")).collect();
    ensure!(none.len() == 1, "{} answers", none.len());
    let error = none.into_iter().next().and_then(Result::err).context("a GPU called nosuch")?;
    ensure!(error.line().contains("nosuch") && error.line().contains(LAVAPIPE), "{}", error.line());
    // A display's node that no GPU has changes nothing.
    let near = GpuRequest { near: Some("/dev/dri/nosuch".into()), ..GpuRequest::default() };
    ensure!(Gpu::open(&near)?.info() == Gpu::open(&GpuRequest::default())?.info(), "another GPU");
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
