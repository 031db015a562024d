//! Conversion by the GPU: every pixel compared with what the CPU makes of the same bytes.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use dmaflow::endpoint::{JoinError, Rung, Sink};
use dmaflow::error;
use dmaflow::format::{Colour, Encoding, Format, Kind, Layout, Modifier, Range};
use dmaflow::frame::{Buffer, Room};
use dmaflow::kms::{Display, DisplayRequest};
use dmaflow::memory::{Allocator, Memory};
use dmaflow::vulkan::ash::vk;
use dmaflow::vulkan::{Crop, Gpu, GpuBuffer, GpuConverter, GpuRequest};

use crate::camera::format;
use crate::gpu::{LAVAPIPE, is_tested, silent, watched};
use crate::harness::{Outcome, PASSED, Test, note};
use crate::modules::kernel;
use crate::picture::{Picture, made, noise};
use crate::process::{State, finish, number, pipe};
use crate::vulkan::{MANY, pipe as to_gpu};

const NEEDS: &[&str] = &["udmabuf", "vulkaninfo"];
const TILING: &[&str] = &["vkms", "udmabuf", "vulkaninfo"];
const LADDER: &[&str] = &["vivid", "vkms", "udmabuf", "vulkaninfo"];

pub const TESTS: &[Test] = &[
    Test { name: "convert::every_format", needs: NEEDS, seconds: 300, run: every_format },
    Test { name: "convert::crops_and_scales", needs: NEEDS, seconds: 120, run: crops_and_scales },
    Test { name: "convert::very_small", needs: NEEDS, seconds: 120, run: very_small },
    Test { name: "convert::several_memory_planes", needs: NEEDS, seconds: 120, run: several_memory_planes },
    Test { name: "convert::into_memory_of_the_gpu", needs: NEEDS, seconds: 120, run: into_memory_of_the_gpu },
    Test { name: "convert::memory_that_ends_within_a_word", needs: NEEDS, seconds: 120, run: ends_within_a_word },
    Test { name: "convert::unstated_tiling", needs: TILING, seconds: 120, run: unstated_tiling },
    Test { name: "convert::buffers_that_come_and_go", needs: NEEDS, seconds: 120, run: buffers_that_come_and_go },
    Test { name: "convert::refusals", needs: NEEDS, seconds: 120, run: refusals },
    Test { name: "convert::a_gpu_that_hangs", needs: NEEDS, seconds: 240, run: a_gpu_that_hangs },
    Test { name: "convert::a_thousand_pictures", needs: NEEDS, seconds: 300, run: a_thousand_pictures },
    Test { name: "convert::on_the_ladder", needs: LADDER, seconds: 400, run: on_the_ladder },
];

fn convert(gpu: &Gpu, source: &Buffer, crop: Crop, to: &Layout) -> Result<Buffer> {
    let target = made(to)?;
    let mut converter = GpuConverter::new(gpu, source.layout(), to, crop)?;
    converter.convert(source, &target)?;
    Ok(target)
}

const SIZE: (u32, u32) = (66, 34);
const ALL: Crop = Crop { x: 0, y: 0, width: SIZE.0, height: SIZE.1 };

fn every_format() -> anyhow::Result<Outcome> {
    let before = State::read();
    let gpu = watched()?;
    // Others share its shader, which is compiled once.
    let like = |name: &str| Layout::packed(format(name), SIZE, 1);
    let shared = GpuConverter::new(&gpu, &like("YUYV")?, &like("XR24")?, ALL)?;
    let mut count = 0;
    let mut worst: f64 = 0.0;
    for from in Format::all() {
        let targets: Vec<_> = GpuConverter::targets(from).collect();
        let yuv = from.is_yuv() && !matches!(from.kind(), Kind::Grey | Kind::DeepGrey { .. });
        let colours = [Encoding::Bt601, Encoding::Bt709, Encoding::Bt2020]
            .into_iter()
            .flat_map(|encoding| [Range::Limited, Range::Full].map(|range| Colour { encoding, range }));
        for colour in colours.take(if yuv { 6 } else { 1 }) {
            // Rows with some bytes more than they need.
            let layout = Layout::packed(from, SIZE, 64)?.with_colour(colour);
            let source = noise(&layout, 0x1234_5678)?;
            let expected = Picture::of(&source)?;
            for &to in targets.iter().take(if count == 0 { 4 } else { 1 }) {
                let words = convert(&gpu, &source, ALL, &Layout::packed(to, SIZE, 256)?);
                let words = words.with_context(|| format!("{from} {colour} to {to}, the {count}th"))?;
                let (steps, place) = expected.furthest(&words)?;
                ensure!(steps <= 1.001, "{from} {colour} to {to}: {steps:.2} steps at {place}");
                worst = worst.max(steps);
                count += 1;
            }
        }
    }
    note(&format!("{count} conversions, {worst:.2} steps of 8 bits at most"));
    ensure!(count > 60, "{count} conversions");
    for name in ["YUYV", "UYVY", "NV12", "NV21", "YU12", "GREY"] {
        let targets: Vec<_> = GpuConverter::targets(format(name)).map(|to| to.to_string()).collect();
        ensure!(targets.starts_with(&["XR24".to_owned(), "AR24".to_owned()]), "{name} to {targets:?}");
    }
    drop(shared);
    silent(gpu)?;
    before.is_back()?;
    PASSED
}

fn crops_and_scales() -> anyhow::Result<Outcome> {
    let gpu = watched()?;
    let crops = [
        (Crop { x: 2, y: 1, width: 33, height: 17 }, (33, 17)),
        (ALL, (132, 68)),
        (ALL, (33, 17)),
        (Crop { x: 5, y: 3, width: 40, height: 20 }, (97, 31)),
        (Crop { x: 65, y: 33, width: 1, height: 1 }, (16, 16)),
    ];
    for name in ["YUYV", "NV12", "GREY", "BA81"] {
        let from = format(name);
        let source = noise(&Layout::packed(from, SIZE, 1)?, 0x9abc_def1)?;
        let picture = Picture::of(&source)?;
        for (crop, size) in crops {
            let words = convert(&gpu, &source, crop, &Layout::packed(format("XR24"), size, 1)?)?;
            let (steps, place) = picture.scaled(crop, size).furthest(&words)?;
            ensure!(steps <= 1.5, "{name} {crop:?} to {size:?}: {steps:.2} steps at {place}");
        }
    }
    silent(gpu)?;
    PASSED
}

/// Smaller than the filters: nothing outside of the picture is read.
fn very_small() -> anyhow::Result<Outcome> {
    let gpu = watched()?;
    let like = |name: &str, size| Layout::packed(format(name), size, 1);
    let shared = GpuConverter::new(&gpu, &like("YUYV", SIZE)?, &like("XR24", SIZE)?, ALL)?;
    for name in ["BA81", "BG10", "GREY", "YUYV", "NV12"] {
        for size in [(2, 2), (4, 2), (2, 6)] {
            let source = noise(&like(name, size)?, 0x7777_1234)?;
            for to in [size, (5, 3)] {
                let words = convert(&gpu, &source, Crop::all(size), &like("XR24", to)?)?;
                let expected = Picture::of(&source)?.scaled(Crop::all(size), to);
                let (steps, place) = expected.furthest(&words)?;
                ensure!(steps <= 1.5, "{name} {size:?} to {to:?}: {steps:.2} steps at {place}");
            }
        }
    }
    drop(shared);
    silent(gpu)?;
    PASSED
}

fn several_memory_planes() -> anyhow::Result<Outcome> {
    let gpu = watched()?;
    for (name, strides) in [("NV12", vec![128, 192]), ("YU12", vec![128, 64, 96]), ("YV12", vec![66, 33, 33])] {
        let source = noise(&Layout::separate(format(name), SIZE, &strides)?, 0x0bad_cafe)?;
        ensure!(source.memory().len() == strides.len(), "{}", source.layout());
        let words = convert(&gpu, &source, ALL, &Layout::packed(format("AR24"), SIZE, 1)?)?;
        let (steps, place) = Picture::of(&source)?.furthest(&words)?;
        ensure!(steps <= 1.001, "{name}: {steps:.2} steps at {place}");
    }
    silent(gpu)?;
    PASSED
}

/// From memory that the GPU made into memory that the GPU made, as an image with rows of its driver's choice.
fn into_memory_of_the_gpu() -> anyhow::Result<Outcome> {
    let gpu = watched()?;
    let layout = |name: &str| Layout::packed(format(name), SIZE, 1);
    let usage = vk::ImageUsageFlags::SAMPLED;
    let target = gpu.make_buffer(&layout("XR24")?, &Room::default(), usage, &[Modifier::LINEAR])?;
    for name in ["NV12", "YUYV"] {
        let noise = noise(&layout(name)?, 0x5eed_5eed)?;
        let source = gpu.make_bytes(noise.layout(), &Room::default(), vk::BufferUsageFlags::STORAGE_BUFFER)?;
        let (reader, mut writer) = (noise.read()?, source.write()?);
        let form = noise.layout().format();
        for plane in 0..form.planes() {
            let mut row = vec![0; form.row_bytes(plane, SIZE.0) as usize];
            for y in 0..form.rows(plane, SIZE.1) {
                reader.row(plane, y, &mut row);
                writer.row(plane, y, &row);
            }
        }
        writer.end()?;
        GpuConverter::new(&gpu, source.layout(), target.layout(), ALL)?.convert(&source, &target)?;
        let (steps, place) = Picture::of(&noise)?.furthest(&target)?;
        ensure!(steps <= 1.001, "{name}: {steps:.2} steps at {place}");
    }
    drop(target);
    silent(gpu)?;
    PASSED
}

fn refusals() -> anyhow::Result<Outcome> {
    let gpu = watched()?;
    let layout = |name: &str| Layout::packed(format(name), SIZE, 1);
    let refused = |from: &str, to: &str, word: &str| -> Result<()> {
        let error = GpuConverter::new(&gpu, &layout(from)?, &layout(to)?, ALL).err();
        let error = error.with_context(|| format!("{from} became {to}"))?;
        ensure!(error.line().contains(word), "{}", error.line());
        Ok(())
    };
    refused("RG16", "XR24", "no RG16")?;
    refused("YUYV", "RG16", "no RG16")?;
    let mut converter = GpuConverter::new(&gpu, &layout("YUYV")?, &layout("XR24")?, ALL)?;
    let (source, target) = (made(&layout("YUYV")?)?, made(&layout("XR24")?)?);
    // The wrong way round; memory that nobody can import.
    let plain = Buffer::allocate(Allocator::Plain, &layout("YUYV")?, &Room::default())?;
    for (from, to, word) in [(&target, &source, "was made for"), (&plain, &target, "plain memory")] {
        match converter.convert(from, to) {
            Err(JoinError::Refused(refusal)) => {
                ensure!(refusal.rung == Rung::Converted && refusal.why.contains(word), "{refusal}");
                ensure!(!refusal.repair.is_empty(), "{refusal}");
            }
            other => anyhow::bail!("{other:?}"),
        }
    }
    // It goes on with good ones.
    converter.convert(&source, &target)?;
    ensure!(converter.imports() == 2, "{} imports", converter.imports());
    drop((converter, source, target, plain));
    silent(gpu)?;
    PASSED
}

/// Work that never ends, on a driver that does not reset: a failure after 30 s, and from then on no wait of more than a few.
fn a_gpu_that_hangs() -> anyhow::Result<Outcome> {
    let (from, to) = (Layout::packed(format("YUYV"), SIZE, 1)?, Layout::packed(format("XR24"), SIZE, 1)?);
    let (source, target) = (noise(&from, 1)?, made(&to)?);
    let timed_out = |converter: &mut GpuConverter| -> Result<Duration> {
        let start = Instant::now();
        match converter.convert(&source, &target) {
            Err(JoinError::Failed(error)) if error.kind() == error::Kind::Timeout => Ok(start.elapsed()),
            other => anyhow::bail!("{other:?}"),
        }
    };
    let gpu = Gpu::open(&GpuRequest { name: Some(LAVAPIPE.into()), ..GpuRequest::default() })?;
    let mut converter = GpuConverter::new(&gpu, &from, &to, ALL)?;
    converter.convert(&source, &target)?;
    let stuck = Stuck::new(&gpu)?;
    let waited = timed_out(&mut converter)?;
    ensure!((28..45).contains(&waited.as_secs()), "gave up after {waited:?}");
    let start = Instant::now();
    timed_out(&mut converter)?;
    let mut next = GpuConverter::new(&gpu, &from, &to, ALL)?;
    timed_out(&mut next)?;
    drop((converter, next));
    ensure!(start.elapsed().as_secs() < 10, "{:?} for what cannot end", start.elapsed());
    // Opened again it is another device, and works.
    let again = watched()?;
    GpuConverter::new(&again, &from, &to, ALL)?.convert(&source, &target)?;
    let (steps, place) = Picture::of(&source)?.furthest(&target)?;
    ensure!(steps <= 1.001, "{steps:.2} steps at {place}");
    silent(again)?;
    // Nothing that it used was destroyed: it ends now as if nothing had been.
    stuck.end()?;
    PASSED
}

/// Work of a GPU that waits for the CPU.
struct Stuck {
    gpu: Gpu,
    event: vk::Event,
    pool: vk::CommandPool,
}

impl Stuck {
    fn new(gpu: &Gpu) -> Result<Stuck> {
        let device = gpu.device();
        // SAFETY: handles of one device, each used as it was made for; `end` waits before anything is destroyed.
        unsafe {
            let event = device.create_event(&vk::EventCreateInfo::default(), None)?;
            let info = vk::CommandPoolCreateInfo::default().queue_family_index(gpu.queue_family());
            let pool = device.create_command_pool(&info, None)?;
            let info = vk::CommandBufferAllocateInfo::default()
                .command_pool(pool)
                .command_buffer_count(1);
            let commands = device.allocate_command_buffers(&info)?;
            device.begin_command_buffer(commands[0], &vk::CommandBufferBeginInfo::default())?;
            let (host, all) = (vk::PipelineStageFlags::HOST, vk::PipelineStageFlags::ALL_COMMANDS);
            device.cmd_wait_events(commands[0], &[event], host, all, &[], &[], &[]);
            device.end_command_buffer(commands[0])?;
            let queue = gpu.queue().lock().expect("nobody panics");
            let submit = vk::SubmitInfo::default().command_buffers(&commands);
            device.queue_submit(*queue, &[submit], vk::Fence::null())?;
            drop(queue);
            Ok(Stuck { gpu: gpu.clone(), event, pool })
        }
    }

    fn end(self) -> Result<()> {
        let device = self.gpu.device();
        // SAFETY: as above; the queue is locked.
        unsafe {
            device.set_event(self.event)?;
            device.queue_wait_idle(*self.gpu.queue().lock().expect("nobody panics"))?;
            device.destroy_command_pool(self.pool, None);
            device.destroy_event(self.event, None);
        }
        Ok(())
    }
}

fn a_thousand_pictures() -> anyhow::Result<Outcome> {
    let before = State::read();
    let gpu = watched()?;
    let (from, to) = (Layout::packed(format("YUYV"), SIZE, 1)?, Layout::packed(format("XR24"), SIZE, 1)?);
    let mut converter = GpuConverter::new(&gpu, &from, &to, ALL)?;
    let sources = (1..=4).map(|seed| noise(&from, seed)).collect::<Result<Vec<_>>>()?;
    let targets = (0..4).map(|_| made(&to)).collect::<Result<Vec<_>>>()?;
    converter.prepare(&sources, &targets)?;
    let prepared = State::read();
    for number in 0..1000 {
        converter.convert(&sources[number % 4], &targets[number / 4 % 4])?;
    }
    prepared.is_back()?;
    ensure!(converter.imports() == 8, "{} imports", converter.imports());
    for (source, target) in sources.iter().rev().zip(targets.iter()) {
        converter.convert(source, target)?;
        let (steps, place) = Picture::of(source)?.furthest(target)?;
        ensure!(steps <= 1.001, "{steps:.2} steps at {place}");
    }
    // What is gone is forgotten with the next that are prepared.
    drop(targets);
    let targets = [made(&to)?];
    converter.prepare(&sources, &targets)?;
    drop((converter, sources, targets));
    silent(gpu)?;
    before.is_back()?;
    PASSED
}

/// The first memory plane of a buffer as if it were another's.
fn shared(buffer: &Buffer, layout: Layout, lens: &[usize]) -> Result<Buffer> {
    let dma_buf = buffer.dma_buf(0).context("no dma-buf")?.clone();
    Ok(Buffer::new(layout, vec![Memory::DmaBuf(dma_buf)], lens)?)
}

/// A camera's driver says how long a picture is (`sizeimage`), and that need not be a whole number of words: the last samples are read all
/// the same.
fn ends_within_a_word() -> anyhow::Result<Outcome> {
    let gpu = watched()?;
    for (name, size) in [("NV12", SIZE), ("YU12", SIZE), ("GREY", (33, 17)), ("BA81", (33, 17)), ("BG10", (33, 17))] {
        let layout = Layout::packed(format(name), size, 1)?;
        let len = layout.memory_len(0);
        ensure!(!len.is_multiple_of(4), "{layout} ends with a word");
        let all = noise(&layout, 0x0dd5_0de0)?;
        let source = shared(&all, layout, &[len])?;
        let imported = GpuBuffer::import(&gpu, &source, 0, vk::BufferUsageFlags::STORAGE_BUFFER)?;
        ensure!(imported.len() == len.next_multiple_of(4) as u64, "{} for {len}", imported.len());
        drop(imported);
        let words = convert(&gpu, &source, Crop::all(size), &Layout::packed(format("XR24"), size, 1)?)?;
        let (steps, place) = Picture::of(&all)?.furthest(&words)?;
        ensure!(steps <= 1.001, "{name}: {steps:.2} steps at {place}");
    }
    silent(gpu)?;
    PASSED
}

/// Of a DRM driver's buffer nobody knows how it is tiled until somebody states it: neither read nor written before.
fn unstated_tiling() -> anyhow::Result<Outcome> {
    let gpu = watched()?;
    let size = (320, 180);
    let (yuyv, words) = (Layout::packed(format("YUYV"), size, 1)?, Layout::packed(format("XR24"), size, 1)?);
    let source = noise(&yuyv, 0x0711_1e50)?;
    let mut display = Display::find("vkms", DisplayRequest::default())?;
    let dumb = display.allocate(&words, &Room::default(), 1)?.pop().context("no buffer")?;
    let to = *dumb.layout();
    ensure!(to.modifier().is_none(), "{to}");
    let refused = |result: Result<(), JoinError>| -> Result<()> {
        match result {
            Err(JoinError::Refused(refusal)) => {
                ensure!(refusal.rung == Rung::Converted && refusal.step == "modifiers", "{refusal}");
                ensure!(refusal.why.contains("nobody stated") && refusal.why.contains("drm"), "{refusal}");
                Ok(())
            }
            other => anyhow::bail!("{other:?}"),
        }
    };
    refused(GpuConverter::new(&gpu, &yuyv, &to, Crop::all(size))?.convert(&source, &dumb))?;
    // As a source: the same memory, as if it were of YUYV.
    let from = Layout::packed(format("YUYV"), size, 4)?;
    let unknown = shared(&dumb, from, dumb.memory_lens())?;
    refused(GpuConverter::new(&gpu, &from, &words, Crop::all(size))?.convert(&unknown, &made(&words)?))?;
    // Stated by who knows: in the converter's layout, or in the buffer's.
    let linear = to.with_modifier(Some(Modifier::LINEAR));
    let mut converter = GpuConverter::new(&gpu, &yuyv, &linear, Crop::all(size))?;
    converter.convert(&source, &dumb)?;
    let (steps, place) = Picture::of(&source)?.furthest(&dumb)?;
    ensure!(steps <= 1.001, "{steps:.2} steps at {place}");
    converter.convert(&source, &dumb.with_layout(linear)?)?;
    // What a buffer states stands against what the converter was made for.
    let other = Modifier::from_drm((1 << 56) | 1).context("a modifier")?;
    match converter.convert(&source, &dumb.with_layout(to.with_modifier(Some(other)))?) {
        Err(JoinError::Refused(refusal)) => ensure!(refusal.step == "layout", "{refusal}"),
        done => anyhow::bail!("{done:?}"),
    }
    drop((converter, display, dumb, unknown));
    silent(gpu)?;
    PASSED
}

/// A program that has new buffers for each picture, and prepares none: what is gone is forgotten.
fn buffers_that_come_and_go() -> anyhow::Result<Outcome> {
    let gpu = watched()?;
    let (from, to) = (Layout::packed(format("YUYV"), SIZE, 1)?, Layout::packed(format("XR24"), SIZE, 1)?);
    let mut converter = GpuConverter::new(&gpu, &from, &to, ALL)?;
    let before = State::read();
    for seed in 1..=20 {
        let (source, target) = (noise(&from, seed)?, made(&to)?);
        converter.convert(&source, &target)?;
        let (steps, place) = Picture::of(&source)?.furthest(&target)?;
        ensure!(steps <= 1.001, "{steps:.2} steps at {place}");
        let there = before.new_dma_bufs().len();
        // Those of this picture, and those of the one before, which the kernel may free a moment later.
        ensure!((2..=4).contains(&there), "{there} dma-bufs after {seed} pictures");
    }
    ensure!(converter.imports() == 40, "{} imports", converter.imports());
    drop(converter);
    before.is_back()?;
    silent(gpu)?;
    PASSED
}

/// A run in which the GPU made every picture, each of them right, and the CPU copied nothing.
fn converted(options: &str, frames: u64) -> Result<()> {
    // Under the eyes of the validation layer: a message makes it fail.
    let mut command = pipe(&format!("{options} --frames {frames} --path convert --verify"));
    let result = finish(command.env("DMAFLOW_VULKAN_VALIDATION", "1"))?.json(0)?;
    ensure!(result["path"] == "converted", "{result}");
    for (what, expected) in [
        ("bytes_copied", 0),
        ("frames/captured", frames),
        ("frames/presented", frames),
        ("verify/checked", frames),
        ("verify/wrong", 0),
    ] {
        ensure!(number(&result, what)? == expected, "{what} is not {expected}: {result}");
    }
    ensure!(is_tested(&result["gpu"]), "{result}");
    Ok(())
}

fn on_the_ladder() -> anyhow::Result<Outcome> {
    let before = State::read();
    converted(&format!("--format YUYV {MANY}"), 120)?;
    for code in ["UYVY", "GREY", "YVYU", "NV12", "YU12"] {
        // vkms of 7.x has the last two itself; where a conversion is asked for, one is made.
        converted(&format!("--format {code} {MANY}"), 5).with_context(|| code.to_owned())?;
    }
    converted("--format YUYV --size 320x180 --input 0 --present mailbox --fps 5", 5)?;
    // A Bayer picture is not compared with the frame that it was made from; that it is shown right is.
    let result = finish(&mut pipe(&format!("--format BA81 {MANY} --frames 8 --path convert --verify")))?.json(0)?;
    ensure!(result["path"] == "converted" && number(&result, "verify/wrong")? == 0, "{result}");
    ensure!(number(&result, "bytes_copied")? == 0 && number(&result, "verify/checked")? == 8, "{result}");

    // The layer watches the GPU that the ladder opens: without it there is none.
    let mut unwatched = pipe(&format!("--format YUYV {MANY} --frames 2 --path convert"));
    unwatched
        .env("DMAFLOW_VULKAN_VALIDATION", "1")
        .env("VK_LAYER_PATH", "/nonexistent");
    finish(&mut unwatched)?.one_line(1, &["converted", "validation layer", "install"])?;

    // Into a GPU: the one that reads converts, and says both.
    let mut command = to_gpu(&format!("--format YUYV {MANY} --frames 5 --path convert --verify"));
    let result = finish(&mut command)?.json(0)?;
    ensure!(result["path"] == "converted" && number(&result, "verify/checked")? == 5, "{result}");
    ensure!(number(&result, "verify/wrong")? == 0 && number(&result, "bytes_copied")? == 0, "{result}");
    ensure!(is_tested(&result["gpu"]), "{result}");
    ensure!(result["gpu"]["checksums"].as_array().is_some_and(|all| all.len() == 5), "{result}");

    // One byte of a converted picture is changed: found.
    let options = format!("--format YUYV {MANY} --frames 5 --path convert --verify --corrupt-frame 3");
    let run = finish(&mut pipe(&options))?;
    ensure!(number(&run.json(4)?, "verify/first_wrong/frame")? == 3, "{}", run.stdout);

    // No copy, but a conversion: not what was demanded. Left alone, the CPU does it, and the result says why.
    let run = finish(&mut pipe("--format YUYV --size 320x180 --frames 2 --path zero-copy"))?;
    run.one_line(3, &["YUYV"])?;
    let result = finish(&mut pipe("--format YUYV --size 320x180 --frames 2"))?.json(0)?;
    ensure!(result["path"] == "copied" && result.get("gpu").is_none(), "{result}");
    let refusals = result["refusals"].as_array().context("refusals")?;
    let refusal = refusals
        .iter()
        .find(|refusal| refusal["rung"] == "converted")
        .context("the GPU was not asked")?;
    ensure!(refusal["why"].as_str().is_some_and(|why| why.contains("software")), "{refusal}");
    ensure!(
        refusal["repair"]
            .as_str()
            .is_some_and(|repair| repair.contains("--path convert")),
        "{refusal}"
    );

    // What it does not make: said, and nothing is copied instead.
    for (options, word) in [("--format XR24 --size 320x180", "XR24"), ("--format RGB3 --size 320x180", "BG24")] {
        let run = finish(&mut pipe(&format!("{options} --frames 2 --path convert")))?;
        run.one_line(1, &["converted", word])?;
    }
    note(&format!("on Linux {}.{}", kernel().0, kernel().1));
    before.is_back()?;
    PASSED
}
