//! Drawing and reading back, with nothing but wgpu: it knows no camera.

use std::sync::mpsc;

use anyhow::Context;

/// Width and height of the picture that is drawn. A row of it has a multiple of 256 bytes, which copies into buffers want.
pub const CANVAS: [u32; 2] = [640, 480];

const FORMAT: wgpu::TextureFormat = wgpu::TextureFormat::Rgba8Unorm;
const ROW_BYTES: u32 = CANVAS[0] * 4;

/// What is drawn to, and how.
pub struct Canvas {
    device: wgpu::Device,
    texture: wgpu::Texture,
    view: wgpu::TextureView,
    pipeline: wgpu::RenderPipeline,
    nearest: wgpu::Sampler,
}

impl Canvas {
    pub fn new(device: &wgpu::Device) -> Canvas {
        let texture = device.create_texture(&wgpu::TextureDescriptor {
            label: Some("canvas"),
            size: size(),
            mip_level_count: 1,
            sample_count: 1,
            dimension: wgpu::TextureDimension::D2,
            format: FORMAT,
            usage: wgpu::TextureUsages::RENDER_ATTACHMENT | wgpu::TextureUsages::COPY_SRC,
            view_formats: &[],
        });
        let view = texture.create_view(&wgpu::TextureViewDescriptor::default());
        let shader = device.create_shader_module(wgpu::include_wgsl!("draw.wgsl"));
        let pipeline = device.create_render_pipeline(&wgpu::RenderPipelineDescriptor {
            label: Some("draw"),
            layout: None,
            vertex: wgpu::VertexState {
                module: &shader,
                entry_point: Some("cover"),
                compilation_options: wgpu::PipelineCompilationOptions::default(),
                buffers: &[],
            },
            primitive: wgpu::PrimitiveState::default(),
            depth_stencil: None,
            multisample: wgpu::MultisampleState::default(),
            fragment: Some(wgpu::FragmentState {
                module: &shader,
                entry_point: Some("draw"),
                compilation_options: wgpu::PipelineCompilationOptions::default(),
                targets: &[Some(FORMAT.into())],
            }),
            multiview_mask: None,
            cache: None,
        });
        // The nearest texel, which every format that can be sampled has, whatever its tiling.
        let nearest = device.create_sampler(&wgpu::SamplerDescriptor::default());
        Canvas { device: device.clone(), texture, view, pipeline, nearest }
    }

    /// The commands that draw a texture.
    pub fn draw(&self, texture: &wgpu::TextureView) -> wgpu::CommandBuffer {
        let bindings = self.device.create_bind_group(&wgpu::BindGroupDescriptor {
            label: None,
            layout: &self.pipeline.get_bind_group_layout(0),
            entries: &[
                wgpu::BindGroupEntry { binding: 0, resource: wgpu::BindingResource::TextureView(texture) },
                wgpu::BindGroupEntry { binding: 1, resource: wgpu::BindingResource::Sampler(&self.nearest) },
            ],
        });
        let mut encoder = self.device.create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
        let mut pass = encoder.begin_render_pass(&wgpu::RenderPassDescriptor {
            color_attachments: &[Some(wgpu::RenderPassColorAttachment {
                view: &self.view,
                depth_slice: None,
                resolve_target: None,
                ops: wgpu::Operations { load: wgpu::LoadOp::Clear(wgpu::Color::BLACK), store: wgpu::StoreOp::Store },
            })],
            ..wgpu::RenderPassDescriptor::default()
        });
        pass.set_pipeline(&self.pipeline);
        pass.set_bind_group(0, &bindings, &[]);
        pass.draw(0..3, 0..1);
        drop(pass);
        encoder.finish()
    }

    /// What was drawn last, three bytes a pixel.
    pub fn read(&self, queue: &wgpu::Queue) -> anyhow::Result<Vec<u8>> {
        let buffer = self.device.create_buffer(&wgpu::BufferDescriptor {
            label: Some("pixels"),
            size: u64::from(ROW_BYTES) * u64::from(CANVAS[1]),
            usage: wgpu::BufferUsages::COPY_DST | wgpu::BufferUsages::MAP_READ,
            mapped_at_creation: false,
        });
        let mut encoder = self.device.create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
        let rows = wgpu::TexelCopyBufferLayout { offset: 0, bytes_per_row: Some(ROW_BYTES), rows_per_image: None };
        let target = wgpu::TexelCopyBufferInfo { buffer: &buffer, layout: rows };
        encoder.copy_texture_to_buffer(self.texture.as_image_copy(), target, size());
        queue.submit([encoder.finish()]);
        let (done, mapped) = mpsc::channel();
        buffer.map_async(wgpu::MapMode::Read, .., move |result| {
            // Nobody hears it only where the wait below has failed.
            let _ = done.send(result);
        });
        self.device.poll(wgpu::PollType::wait_indefinitely())?;
        mapped.recv().context("the pixels were not mapped")??;
        let rgba = buffer.get_mapped_range(..)?;
        Ok(rgba.chunks_exact(4).flat_map(|pixel| pixel.iter().take(3).copied()).collect())
    }
}

fn size() -> wgpu::Extent3d {
    wgpu::Extent3d { width: CANVAS[0], height: CANVAS[1], depth_or_array_layers: 1 }
}
