//! Conversion by the GPU: every pixel compared with what the CPU makes of the same bytes.

use anyhow::{Context, Result, ensure};
use dmaflow::endpoint::{JoinError, Rung};
use dmaflow::format::{Colour, Encoding, Format, Kind, Layout, Modifier, Pixels, Range};
use dmaflow::frame::{Buffer, Room};
use dmaflow::memory::Allocator;
use dmaflow::vulkan::ash::vk;
use dmaflow::vulkan::{Crop, Gpu, GpuConverter};

use crate::camera::format;
use crate::gpu::{silent, watched};
use crate::harness::{Outcome, PASSED, Test, note};
use crate::modules::kernel;
use crate::process::{State, finish, number, pipe};
use crate::vulkan::MANY;

const NEEDS: &[&str] = &["udmabuf", "vulkaninfo"];
const LADDER: &[&str] = &["vivid", "vkms", "udmabuf", "vulkaninfo"];

pub const TESTS: &[Test] = &[
    Test { name: "convert::every_format", needs: NEEDS, seconds: 300, run: every_format },
    Test { name: "convert::crops_and_scales", needs: NEEDS, seconds: 120, run: crops_and_scales },
    Test { name: "convert::very_small", needs: NEEDS, seconds: 120, run: very_small },
    Test { name: "convert::several_memory_planes", needs: NEEDS, seconds: 120, run: several_memory_planes },
    Test { name: "convert::into_memory_of_the_gpu", needs: NEEDS, seconds: 120, run: into_memory_of_the_gpu },
    Test { name: "convert::refusals", needs: NEEDS, seconds: 120, run: refusals },
    Test { name: "convert::a_thousand_pictures", needs: NEEDS, seconds: 300, run: a_thousand_pictures },
    Test { name: "convert::on_the_ladder", needs: LADDER, seconds: 400, run: on_the_ladder },
];

/// Bytes that look random, the same in each run (xorshift32).
struct Noise(u32);

impl Noise {
    fn fill(&mut self, bytes: &mut [u8]) {
        for byte in bytes {
            self.0 ^= self.0 << 13;
            self.0 ^= self.0 >> 17;
            self.0 ^= self.0 << 5;
            *byte = self.0.to_le_bytes()[1];
        }
    }
}

fn made(layout: &Layout) -> Result<Buffer> {
    Ok(Buffer::allocate(Allocator::Udmabuf, layout, &Room::default())?)
}

/// A picture in which every sample has some value, none of them outside its bits.
fn noise(layout: &Layout, seed: u32) -> Result<Buffer> {
    let buffer = made(layout)?;
    let mut writer = buffer.write()?;
    let mut noise = Noise(seed);
    let form = layout.format();
    let deep = match form.kind() {
        Kind::Bayer { bits, .. } | Kind::DeepGrey { bits } if bits > 8 => Some(bits),
        _ => None,
    };
    for plane in 0..form.planes() {
        let mut row = vec![0; form.row_bytes(plane, layout.width()) as usize];
        for y in 0..form.rows(plane, layout.height()) {
            noise.fill(&mut row);
            if let Some(bits) = deep {
                row.as_chunks_mut::<2>()
                    .0
                    .iter_mut()
                    .for_each(|sample| sample[1] &= 0xff >> (16 - bits));
            }
            writer.row(plane, y, &row);
        }
    }
    writer.end()?;
    Ok(buffer)
}

/// The bytes of the memory planes.
fn bytes(buffer: &Buffer) -> Result<Vec<Vec<u8>>> {
    let reader = buffer.read()?;
    let planes = (0u32..).zip(buffer.memory_lens());
    planes
        .map(|(plane, &len)| {
            let mut all = vec![0; len];
            reader.memory(plane).context("no such memory plane")?.read(0, &mut all);
            Ok(all)
        })
        .collect()
}

/// The colours of a picture, by the CPU: white is 1.
struct Picture {
    size: (u32, u32),
    pixels: Vec<[f64; 3]>,
}

impl Picture {
    fn of(buffer: &Buffer) -> Result<Picture> {
        let (layout, memory) = (buffer.layout(), bytes(buffer)?);
        let memory: Vec<_> = memory.iter().map(Vec::as_slice).collect();
        let (width, height) = layout.size();
        let mut pixels = Vec::new();
        for y in 0..height {
            let row = Pixels::at(layout, &memory, y);
            for x in 0..width {
                let colour = row.rgb(x, layout.colour());
                pixels.push([colour.r, colour.g, colour.b].map(|value| f64::from(value) / 255.0));
            }
        }
        let samples = Picture { size: (width, height), pixels };
        Ok(match layout.format().kind() {
            Kind::Bayer { red, bits } => samples.demosaiced(red, bits, layout, &memory),
            _ => samples,
        })
    }

    fn at(&self, x: i64, y: i64) -> [f64; 3] {
        self.pixels[(y * i64::from(self.size.0) + x) as usize]
    }

    /// By the tables of Malvar, He and Cutler, as weights of the five by five samples around a pixel, in sixteenths.
    fn demosaiced(self, red: [u8; 2], bits: u8, layout: &Layout, memory: &[&[u8]]) -> Picture {
        #[rustfmt::skip]
        const GREEN: [i32; 25] = [0, 0, -2, 0, 0,  0, 0, 4, 0, 0,  -2, 4, 8, 4, -2,  0, 0, 4, 0, 0,  0, 0, -2, 0, 0];
        #[rustfmt::skip]
        const BESIDE: [i32; 25] = [0, 0, 1, 0, 0,  0, -2, 0, -2, 0,  -2, 8, 10, 8, -2,  0, -2, 0, -2, 0,  0, 0, 1, 0, 0];
        #[rustfmt::skip]
        const CORNERS: [i32; 25] = [0, 0, -3, 0, 0,  0, 4, 0, 4, 0,  -3, 0, 12, 0, -3,  0, 4, 0, 4, 0,  0, 0, -3, 0, 0];
        let (width, height) = (i64::from(self.size.0), i64::from(self.size.1));
        let place = layout.planes()[0];
        let top = f64::from((1u32 << bits) - 1);
        let fold = |at: i64, size: i64| ((size - 1) - ((size - 1) - at.abs()).abs()).max(0);
        let sample = |x: i64, y: i64| {
            let size = if bits > 8 { 2 } else { 1 };
            let at = place.offset as usize
                + fold(y, height) as usize * place.stride as usize
                + fold(x, width) as usize * size;
            let value =
                if size == 1 { memory[0][at].into() } else { u16::from_le_bytes([memory[0][at], memory[0][at + 1]]) };
            f64::from(value) / top
        };
        let weighed = |table: &[i32; 25], turned: bool, x: i64, y: i64| {
            let sum = (0..25).map(|index| {
                let (column, row) = (index % 5 - 2, index / 5 - 2);
                let (column, row) = if turned { (row, column) } else { (column, row) };
                f64::from(table[index as usize]) * sample(x + column, y + row)
            });
            (sum.sum::<f64>() / 16.0).clamp(0.0, 1.0)
        };
        let mut pixels = Vec::new();
        for y in 0..height {
            for x in 0..width {
                let own = sample(x, y);
                let (odd_column, odd_row) = ((x ^ i64::from(red[0])) & 1 == 1, (y ^ i64::from(red[1])) & 1 == 1);
                pixels.push(match (odd_column, odd_row) {
                    (false, false) => [own, weighed(&GREEN, false, x, y), weighed(&CORNERS, false, x, y)],
                    (true, true) => [weighed(&CORNERS, false, x, y), weighed(&GREEN, false, x, y), own],
                    // Green with red beside it; green with blue beside it.
                    (true, false) => [weighed(&BESIDE, false, x, y), own, weighed(&BESIDE, true, x, y)],
                    (false, true) => [weighed(&BESIDE, true, x, y), own, weighed(&BESIDE, false, x, y)],
                });
            }
        }
        Picture { pixels, ..self }
    }

    /// A part of it in another size: between the four nearest pixels, those at the edge standing for what is outside.
    fn scaled(&self, crop: Crop, (width, height): (u32, u32)) -> Picture {
        let mut pixels = Vec::new();
        let nearest = |at: f64, first: u32, count: u32| {
            let (low, high) = (i64::from(first), i64::from(first + count) - 1);
            let corner = at.floor();
            ((corner as i64).clamp(low, high), (corner as i64 + 1).clamp(low, high), at - corner)
        };
        for y in 0..height {
            let down = f64::from(crop.y) + (f64::from(y) + 0.5) * f64::from(crop.height) / f64::from(height) - 0.5;
            let (above, below, part_down) = nearest(down, crop.y, crop.height);
            for x in 0..width {
                let along = f64::from(crop.x) + (f64::from(x) + 0.5) * f64::from(crop.width) / f64::from(width) - 0.5;
                let (left, right, part) = nearest(along, crop.x, crop.width);
                pixels.push(std::array::from_fn(|channel| {
                    let at = |x, y| self.at(x, y)[channel];
                    let upper = at(left, above) * (1.0 - part) + at(right, above) * part;
                    let lower = at(left, below) * (1.0 - part) + at(right, below) * part;
                    upper * (1.0 - part_down) + lower * part_down
                }));
            }
        }
        Picture { size: (width, height), pixels }
    }

    /// The largest difference to a picture of words, in steps of 8 bits, and where it is.
    fn furthest(&self, words: &Buffer) -> Result<(f64, String)> {
        let converted = Picture::of(words)?;
        ensure!(converted.size == self.size, "{:?} instead of {:?}", converted.size, self.size);
        let mut worst = (0.0, String::new());
        for (index, (one, other)) in self.pixels.iter().zip(&converted.pixels).enumerate() {
            for (expected, found) in one.iter().zip(other) {
                let steps = (expected - found).abs() * 255.0;
                if steps > worst.0 {
                    let (x, y) = (index as u32 % self.size.0, index as u32 / self.size.0);
                    worst = (steps, format!("({x}, {y}): {one:?} became {other:?}"));
                }
            }
        }
        Ok(worst)
    }
}

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

/// A run in which the GPU made every picture, each of them right, and the CPU copied nothing.
fn converted(options: &str, frames: u64) -> Result<()> {
    let options = format!("{options} --frames {frames} --path convert --verify");
    let result = finish(&mut pipe(&options))?.json(0)?;
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
    ensure!(result["gpu"]["name"].as_str().is_some_and(|name| name.contains("llvmpipe")), "{result}");
    ensure!(result["gpu"]["software"] == true, "{result}");
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
