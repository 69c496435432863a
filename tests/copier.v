// A stand-in for the core with its ports: copies T beats from PARAMS (port 0) to OUT (port 0), one burst of up to 16 at a
// time. What it does wrong on purpose is chosen by macros, so that the harness is seen to find it.
module core (
    input ap_clk, input ap_rst_n,
    input [7:0] s_axi_control_awaddr, input s_axi_control_awvalid, output s_axi_control_awready,
    input [31:0] s_axi_control_wdata, input [3:0] s_axi_control_wstrb, input s_axi_control_wvalid,
    output s_axi_control_wready, output [1:0] s_axi_control_bresp, output reg s_axi_control_bvalid,
    input s_axi_control_bready, input [7:0] s_axi_control_araddr, input s_axi_control_arvalid,
    output s_axi_control_arready, output reg [31:0] s_axi_control_rdata, output [1:0] s_axi_control_rresp,
    output reg s_axi_control_rvalid, input s_axi_control_rready,
`define MANAGER(p) \
    output p``_arvalid, input p``_arready, output [63:0] p``_araddr, output [7:0] p``_arlen, \
    output [2:0] p``_arsize, output [1:0] p``_arburst, input p``_rvalid, output p``_rready, \
    input [127:0] p``_rdata, input [1:0] p``_rresp, input p``_rlast, output p``_awvalid, input p``_awready, \
    output [63:0] p``_awaddr, output [7:0] p``_awlen, output [2:0] p``_awsize, output [1:0] p``_awburst, \
    output p``_wvalid, input p``_wready, output [127:0] p``_wdata, output [15:0] p``_wstrb, output p``_wlast, \
    input p``_bvalid, output p``_bready, input [1:0] p``_bresp
    `MANAGER(m_axi_gmem0),
    `MANAGER(m_axi_gmem1)
);
    reg [31:0] registers [0:63];
    reg [127:0] held [0:15];
    reg [31:0] done, cycles;
    reg [4:0] got, put;
    reg [2:0] state;
    reg [1:0] response;
    reg [3:0] waited;
    wire [31:0] left = registers[5] - done;
    wire [4:0] length = left > 16 ? 16 : left[4:0];
    wire [63:0] source = {registers[13], registers[12]} + 64'd16 * {32'd0, done};
    wire [63:0] target = {registers[21], registers[20]} + 64'd16 * {32'd0, done};

    wire taken = s_axi_control_awvalid && s_axi_control_wvalid && !s_axi_control_bvalid;
    assign s_axi_control_awready = taken, s_axi_control_wready = taken, s_axi_control_bresp = 0;
    assign s_axi_control_arready = !s_axi_control_rvalid, s_axi_control_rresp = 0;

    assign m_axi_gmem0_arvalid = state == 1, m_axi_gmem0_arlen = {3'd0, length} - 8'd1;
    assign m_axi_gmem0_arsize = 4, m_axi_gmem0_arburst = 1, m_axi_gmem0_rready = state == 2;
`ifdef CROSSING
    assign m_axi_gmem0_araddr = source + 64'd3968;
`elsif DRIFTING
    assign m_axi_gmem0_araddr = source + {56'd0, waited, 4'd0};
`else
    assign m_axi_gmem0_araddr = source;
`endif
    assign m_axi_gmem0_awvalid = state == 3, m_axi_gmem0_awaddr = target, m_axi_gmem0_awlen = {3'd0, length} - 8'd1;
    assign m_axi_gmem0_awsize = 4, m_axi_gmem0_awburst = 1;
    assign m_axi_gmem0_wvalid = state == 4 && put < length, m_axi_gmem0_wstrb = 16'hFFFF;
`ifdef NO_LAST
    assign m_axi_gmem0_wlast = 0;
`else
    assign m_axi_gmem0_wlast = put + 5'd1 == length;
`endif
`ifdef UNSTABLE
    assign m_axi_gmem0_wdata = held[put[3:0]] ^ {127'd0, waited[0]};
`else
    assign m_axi_gmem0_wdata = held[put[3:0]];
`endif
    assign m_axi_gmem0_bready = state == 4 && put == length;
    assign {m_axi_gmem1_arvalid, m_axi_gmem1_araddr, m_axi_gmem1_arlen, m_axi_gmem1_arsize, m_axi_gmem1_arburst} = 0;
    assign {m_axi_gmem1_rready, m_axi_gmem1_awvalid, m_axi_gmem1_awaddr, m_axi_gmem1_awlen, m_axi_gmem1_awsize} = 0;
    assign {m_axi_gmem1_awburst, m_axi_gmem1_wvalid, m_axi_gmem1_wdata, m_axi_gmem1_wstrb, m_axi_gmem1_wlast} = 0;
    assign m_axi_gmem1_bready = 0;

    always @(posedge ap_clk) begin
        waited <= waited + 1;
        if (taken) begin
            registers[s_axi_control_awaddr[7:2]] <= s_axi_control_wdata;
            s_axi_control_bvalid <= 1;
        end else if (s_axi_control_bready) s_axi_control_bvalid <= 0;
        if (s_axi_control_arvalid && s_axi_control_arready) begin
            s_axi_control_rvalid <= 1;
            case (s_axi_control_araddr[7:2])
                1: s_axi_control_rdata <= {16'd0, 6'd0, response, 6'd0, state == 5, state != 0 && state != 5};
                32: s_axi_control_rdata <= cycles;
                40: s_axi_control_rdata <= done;
                default: s_axi_control_rdata <= 0;
            endcase
        end else if (s_axi_control_rready) s_axi_control_rvalid <= 0;
        if (state != 0 && state != 5) cycles <= cycles + 1;
        case (state)
            0: if (taken && s_axi_control_awaddr == 0) begin state <= left == 0 ? 5 : 1; got <= 0; end
            1: if (m_axi_gmem0_arready) state <= 2;
            2: if (m_axi_gmem0_rvalid) begin
                held[got[3:0]] <= m_axi_gmem0_rdata;
                got <= got + 1;
                if (m_axi_gmem0_rresp != 0) response <= 1;
                if (m_axi_gmem0_rlast) begin state <= 3; put <= 0; end
            end
            3: if (m_axi_gmem0_awready) state <= 4;
            4: begin
                if (m_axi_gmem0_wvalid && m_axi_gmem0_wready) put <= put + 1;
                if (m_axi_gmem0_bvalid && m_axi_gmem0_bready) begin
                    done <= done + {27'd0, length};
                    got <= 0;
                    if (m_axi_gmem0_bresp != 0) response <= 2;
`ifdef ENDLESS
                    state <= 1;
`else
                    state <= left == {27'd0, length} ? 5 : 1;
`endif
                end
            end
            default: ;
        endcase
        if (!ap_rst_n) begin
            state <= 0; done <= 0; cycles <= 0; response <= 0; waited <= 0;
            s_axi_control_bvalid <= 0; s_axi_control_rvalid <= 0;
        end
    end
endmodule
