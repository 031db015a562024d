//! Pictures of noise, and what a conversion has to make of them, computed by the CPU in double precision.

use anyhow::{Context, Result, ensure};
use dmaflow::format::{Kind, Layout, Pixels};
use dmaflow::frame::{Buffer, Room};
use dmaflow::memory::Allocator;
use dmaflow::vulkan::Crop;

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

/// Memory for a picture.
pub fn made(layout: &Layout) -> Result<Buffer> {
    Ok(Buffer::allocate(Allocator::Udmabuf, layout, &Room::default())?)
}

/// A picture in which every sample has some value, none of them outside its bits.
pub fn noise(layout: &Layout, seed: u32) -> Result<Buffer> {
    let buffer = made(layout)?;
    fill(&buffer, seed)?;
    Ok(buffer)
}

/// Makes it the picture of [`noise`] with this seed.
pub fn fill(buffer: &Buffer, seed: u32) -> Result<()> {
    let layout = buffer.layout();
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
    Ok(writer.end()?)
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
pub struct Picture {
    size: (u32, u32),
    pixels: Vec<[f64; 3]>,
}

impl Picture {
    pub fn of(buffer: &Buffer) -> Result<Picture> {
        let (layout, memory) = (buffer.layout(), bytes(buffer)?);
        let memory: Vec<_> = memory.iter().map(Vec::as_slice).collect();
        let (width, height) = layout.size();
        let mut pixels = Vec::new();
        for y in 0..height {
            let mut row = Pixels::at(layout, &memory, y).colours(layout.colour());
            for x in 0..width {
                let colour = row(x);
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
    pub fn scaled(&self, crop: Crop, (width, height): (u32, u32)) -> Picture {
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
    pub fn furthest(&self, words: &Buffer) -> Result<(f64, String)> {
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
